"""The flat batch of a step on the device: tokens, positions and cache indices."""

from dataclasses import dataclass, field

from torch import Tensor

from dsv3.parallel.expert_dispatch import StepTokens
from dsv3_kernels import Keys, PageTables, StoredRows


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with the same number of new tokens Q, which attend directly to the cache.

    Attributes:
        start, stop: their B * Q rows of the batch.
        page_BG: [B, G] int32 pages of each sequence, padded with the null page.
        query_pos_BQ: [B, Q] int64 positions; -1 for rows that pad the batch.
        is_sparse: the indexer selects the keys of each token; otherwise a token attends to all that
            it sees.
        keys: on a CPU, the expanded page tables, computed once for all layers; None if `is_sparse`.
    """

    start: int
    stop: int
    page_BG: Tensor
    query_pos_BQ: Tensor
    is_sparse: bool = False
    keys: Keys | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence that attend to expanded keys and values.

    Attributes:
        start, stop: its rows of the batch.
        context_len: cached positions before the chunk.
        page_G: [G] int64 pages of the context.
    """

    start: int
    stop: int
    context_len: int
    page_G: Tensor


@dataclass(slots=True)
class Batch:
    """T new tokens: first the rows of decode groups, then those of chunks.

    Attributes:
        token_T: [T] int64 ids.
        position_T: [T] int64 positions in their sequences.
        own_slot: [T] int64 slots for the cache entries; -1 if another rank stores the entry.
        num_decode_rows: rows of all `groups`.
        groups: rows that attend to the cache directly.
        chunks: rows that attend to expanded keys and values.
        tokens: number of tokens of all dp groups.
        chunk_start_L: [L + 1] int32 first rows of the L chunks and the end of the last one,
            counted from the first chunk's; None without chunks.
        selected: the keys that each group attends to, set by the first layer and then by every
            layer with an indexer; the others use it as it is.
        keeps_selected: layers with an indexer use `selected` too, and only write their index keys.
        stored: on a CPU, the rows of `own_slot` with a slot, computed once for all layers.
    """

    token_T: Tensor
    position_T: Tensor
    own_slot: Tensor
    num_decode_rows: int
    tokens: StepTokens = field(default_factory=StepTokens)
    groups: list[DecodeGroup] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    chunk_start_L: Tensor | None = None
    selected: list[PageTables] = field(default_factory=list)
    keeps_selected: bool = False
    stored: StoredRows | None = None
