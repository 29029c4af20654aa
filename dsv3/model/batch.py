"""A step's flat batch as the model sees it, on the device: tokens, positions, cache indices."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with the same number of new tokens, attended together straight from the cache.

    Attributes:
        start, stop: their rows of the batch, B * Q of them.
        slot_BS: [B, S] this rank's slots of each sequence, padded with slot 0.
        key_pos_BS: [B, S] their positions; padding lies above every query.
        query_pos_BQ: [B, Q].
    """

    start: int
    stop: int
    slot_BS: Tensor
    key_pos_BS: Tensor
    query_pos_BQ: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence, attended in expanded form.

    Attributes:
        start, stop: its rows of the batch.
        context_len: positions cached before.
        page_G: [G] int64 pages that cover the context.
    """

    start: int
    stop: int
    context_len: int
    page_G: Tensor


@dataclass(slots=True)
class Batch:
    """T new tokens. Rows of decode groups come first, then the chunks.

    Attributes:
        token_T: [T] int64 ids.
        position_T: [T] int64 positions in their sequences.
        own_row: [O] rows whose cache entries this rank holds; None for all rows.
        own_slot: [O] the slots they go to.
        num_decode_rows: rows covered by `groups`.
    """

    token_T: Tensor
    position_T: Tensor
    own_row: Tensor | None
    own_slot: Tensor
    num_decode_rows: int
    groups: list[DecodeGroup] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
