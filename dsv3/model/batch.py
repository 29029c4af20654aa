"""A step's flat batch as the model sees it, on the device: tokens, positions, cache indices."""

from dataclasses import dataclass, field

from torch import Tensor

from dsv3_kernels import Keys


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with the same number of new tokens, attended together straight from the cache.

    Attributes:
        start, stop: their rows of the batch, B * Q of them.
        page_BG: [B, G] int32 pages of each sequence, filled up with the null page.
        query_pos_BQ: [B, Q] int64; -1 for a row that pads the batch.
        keys: on a CPU, the tables spelled out once for all layers.
    """

    start: int
    stop: int
    page_BG: Tensor
    query_pos_BQ: Tensor
    keys: Keys | None = None


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
        own_slot: [T] int64 slots the cache entries go to; -1 where another rank holds the entry.
        num_decode_rows: rows covered by `groups`.
        groups, chunks: how the rows attend.
        chunk_start_L: [L + 1] int32 first row of each of L chunks and their end, counted from
            the first chunk's; None without any.
    """

    token_T: Tensor
    position_T: Tensor
    own_slot: Tensor
    num_decode_rows: int
    groups: list[DecodeGroup] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    chunk_start_L: Tensor | None = None
