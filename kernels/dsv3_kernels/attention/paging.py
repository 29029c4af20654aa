"""Page tables: the cache slots of a sequence's positions on one rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Keys:
    """Page tables expanded to slots, as the references read them.

    Attributes:
        slot_BS: [B, S] int64 slots in order of position; 0 after a sequence's last query.
        key_pos_S: [S] int64 positions of the slots, the same for all sequences.
        mask_BQS: [B, Q, S] float32, added to scores: 0 for the keys that a query sees, else -inf;
            None if every query sees all keys.
        is_blind_BQ: [B, Q] True for queries that see no key; None if there are none.
    """

    slot_BS: Tensor
    key_pos_S: Tensor
    mask_BQS: Tensor | None = None
    is_blind_BQ: Tensor | None = None

    def sequences(self, start: int, stop: int) -> "Keys":
        """Return the keys of sequences start to stop."""
        some = slice(start, stop)
        mask_BQS = None if self.mask_BQS is None else self.mask_BQS[some]
        is_blind_BQ = None if self.is_blind_BQ is None else self.is_blind_BQ[some]
        return Keys(self.slot_BS[some], self.key_pos_S, mask_BQS, is_blind_BQ)


@dataclass(frozen=True, slots=True)
class Paging:
    """The mapping of positions to slots: rank `shard` of `shards` holds every `shards`-th position.

    Position p of a sequence is in page p // page_size of its table; the rank with
    p % shards == shard holds it, in slot page * slots_per_page + p % page_size // shards.

    Attributes:
        page_size: positions of a page, a multiple of `shards`.
        shards: ranks that share the positions.
        shard: index of this rank among them.
    """

    page_size: int
    shards: int = 1
    shard: int = 0

    @property
    def slots_per_page(self) -> int:
        """Slots of a page on this rank."""
        return self.page_size // self.shards

    def local_len(self, num_tokens: int) -> int:
        """Return the number of a sequence's first `num_tokens` positions on this rank."""
        return (num_tokens - self.shard + self.shards - 1) // self.shards

    def slots(self, page_BG: Tensor, position_B: Tensor) -> Tensor:
        """Return the slots of one position of each sequence, [B] int64.

        They are -1 if another rank stores the position, and for positions below 0 or beyond the
        tables.
        """
        page_B1 = (position_B // self.page_size).clamp(0, page_BG.shape[1] - 1)[:, None]
        first_B = page_BG.gather(1, page_B1)[:, 0].long() * self.slots_per_page
        slot_B = first_B + position_B % self.page_size // self.shards
        is_known = (position_B >= 0) & (position_B < page_BG.shape[1] * self.page_size)
        return slot_B.where(is_known & (position_B % self.shards == self.shard), -1)

    def keys(
        self,
        page_BG: Tensor,
        query_pos_BQ: Tensor,
        longest: int | None = None,
        has_blind: bool = True,
        has_masked: bool = True,
    ) -> Keys:
        """Expand page tables without synchronizing with the device.

        Args:
            page_BG: [B, G] pages of each sequence, padded with any valid page.
            query_pos_BQ: [B, Q] positions of the queries.
            longest: number of positions; None for the capacity of the tables.
            has_blind: a query may see no key of this rank.
            has_masked: a query may not see a key that another one sees, or none.
        """
        device = page_BG.device
        capacity = page_BG.shape[1] * self.slots_per_page
        width = capacity if longest is None else max(1, self.local_len(longest))
        stop = self.shard + width * self.shards
        key_pos_S = torch.arange(self.shard, stop, self.shards, device=device)
        slot_P = torch.arange(self.slots_per_page, device=device)
        slot_BGP = page_BG[..., None].long() * self.slots_per_page + slot_P
        slot_BS = slot_BGP.flatten(1)[:, :width]
        if not has_masked:
            return Keys(slot_BS, key_pos_S)
        is_later_BQS = key_pos_S > query_pos_BQ.unsqueeze(2)
        return Keys(
            slot_BS=slot_BS.masked_fill(is_later_BQS.all(1), 0),
            key_pos_S=key_pos_S,
            mask_BQS=torch.where(is_later_BQS, float("-inf"), 0.0),
            is_blind_BQ=is_later_BQS.all(2) if has_blind else None,
        )


@dataclass(frozen=True, slots=True)
class PageTables:
    """The cached keys of the queries of B sequences.

    Attributes:
        page_BG: [B, G] int32 pages of each sequence, padded with page 0.
        query_pos_BQ: [B, Q] int64 positions; a query sees keys up to its own, so none at -1.
        paging: the positions on this rank, and their slots.
        keys: `paging.keys` of these tables, if known; only the references use them.
    """

    page_BG: Tensor
    query_pos_BQ: Tensor
    paging: Paging
    keys: Keys | None = None

    @property
    def capacity(self) -> int:
        """Positions per sequence that the tables could hold on this rank."""
        return self.page_BG.shape[1] * self.paging.slots_per_page

    def contiguous(self) -> "PageTables":
        """Return tables of contiguous tensors."""
        return PageTables(
            self.page_BG.contiguous(), self.query_pos_BQ.contiguous(), self.paging, self.keys
        )

    def sequences(self, start: int, stop: int) -> "PageTables":
        """Return the tables of sequences start to stop, without keys."""
        return PageTables(self.page_BG[start:stop], self.query_pos_BQ[start:stop], self.paging)

    def blocks(self, num_rows: int) -> Iterator[tuple[slice, "PageTables"]]:
        """Yield the tables of at most about `num_rows` queries each, with their rows of B * Q."""
        B, Q = self.query_pos_BQ.shape
        if num_rows >= B * Q:
            yield slice(0, B * Q), self
            return
        step = max(1, num_rows // Q)
        for b in range(0, B, step):
            some = self.sequences(b, b + step)
            if num_rows >= Q:
                yield slice(b * Q, min(b + step, B) * Q), some
                continue
            for q in range(0, Q, num_rows):
                pos_BQ = some.query_pos_BQ[:, q : q + num_rows]
                rows = slice(b * Q + q, b * Q + q + pos_BQ.shape[1])
                yield rows, PageTables(some.page_BG, pos_BQ, self.paging)

    def by_query(self) -> "PageTables":
        """Return the tables of B * Q sequences of one query each."""
        queries = self.query_pos_BQ.shape[1]
        if queries == 1:
            return self
        page_BG = self.page_BG.repeat_interleave(queries, 0)
        return PageTables(page_BG, self.query_pos_BQ.reshape(-1, 1), self.paging)

    @classmethod
    def stacked(cls, parts: "list[PageTables]") -> "PageTables":
        """Return the tables of all sequences of several tables of one width."""
        if len(parts) == 1:
            return parts[0]
        pages = torch.cat([part.page_BG for part in parts])
        return cls(pages, torch.cat([part.query_pos_BQ for part in parts]), parts[0].paging)

    def expanded(self) -> Keys:
        """Return the slots and positions of the keys, up to those of the last query."""
        if self.keys is not None:
            return self.keys
        longest = int(self.query_pos_BQ.max()) + 1
        return self.paging.keys(self.page_BG, self.query_pos_BQ, longest)
