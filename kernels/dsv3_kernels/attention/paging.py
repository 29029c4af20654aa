"""Where one rank finds a sequence's cache entries: page tables, spelled out where needed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Keys:
    """What page tables say, spelled out: how the references read them.

    Attributes:
        slot_BS: [B, S] int64 slots in order of position; 0 where a sequence has no query behind.
        key_pos_S: [S] int64 their positions, the same for all sequences.
    """

    slot_BS: Tensor
    key_pos_S: Tensor


@dataclass(frozen=True, slots=True)
class Paging:
    """How positions become slots: rank `shard` of `shards` holds every `shards`-th position.

    Position p of a sequence is in page p // page_size of its table; the rank with
    p % shards == shard holds it, in slot page * slots_per_page + p % page_size // shards.

    Attributes:
        page_size: positions of a page, a multiple of `shards`.
        shards: ranks that positions are dealt to; 1 if they are not.
        shard: this rank's index among them.
    """

    page_size: int
    shards: int = 1
    shard: int = 0

    @property
    def slots_per_page(self) -> int:
        """Slots of a page on this rank."""
        return self.page_size // self.shards

    def local_len(self, num_tokens: int) -> int:
        """Return how many of a sequence's first `num_tokens` positions this rank holds."""
        return (num_tokens - self.shard + self.shards - 1) // self.shards

    def keys(self, page_BG: Tensor, query_pos_BQ: Tensor, longest: int | None = None) -> Keys:
        """Spell out page tables without asking the device for anything.

        Args:
            page_BG: [B, G] pages of each sequence, filled up with any valid page.
            query_pos_BQ: [B, Q] positions of the queries.
            longest: positions to look at; None for all that the tables could hold.
        """
        device, held = page_BG.device, page_BG.shape[1] * self.slots_per_page
        width = held if longest is None else max(1, self.local_len(longest))
        key_pos_S = torch.arange(width, device=device) * self.shards + self.shard
        slot_P = torch.arange(self.slots_per_page, device=device)
        slot_BGP = page_BG[..., None].long() * self.slots_per_page + slot_P
        is_padding_BS = key_pos_S > query_pos_BQ.amax(1, keepdim=True)
        return Keys(slot_BGP.flatten(1)[:, :width].masked_fill(is_padding_BS, 0), key_pos_S)
