"""Numbering of the partial outputs of decode attention.

A sequence has a part for each split of its positions on this rank, at least one. Parts are numbered
sequence after sequence, so memory and programs follow the contexts, however wide the page tables
are. Kernels count parts from the queries' positions, BLOCK sequences at a time (see
`numbered_at_once`): no data is prepared by the host, and a CUDA graph follows the contexts.
"""

from dsv3_kernels._triton import tl, triton


@triton.jit
def _held_by(b, end, pos_ptr, queries, shard, SHARDS: tl.constexpr):
    """Return the number of this rank's positions that sequences `b` see; 0 from `end` on."""
    last = tl.full(b.shape, -1, tl.int32)
    for q in range(queries):
        pos = tl.load(pos_ptr + b * queries + q, mask=b < end, other=-1)
        last = tl.maximum(last, pos.to(tl.int32))
    return (last + SHARDS - shard) // SHARDS


@triton.jit
def _splits_of(b, end, split_len, pos_ptr, queries, shard, SHARDS: tl.constexpr):
    """Return the number of parts of sequences `b`; 0 from `end` on."""
    held = _held_by(b, end, pos_ptr, queries, shard, SHARDS)
    return tl.where(b < end, tl.maximum(1, tl.cdiv(held, split_len)), 0)


@triton.jit
def split_length(
    shortest,
    spare,
    sequences,
    pos_ptr,
    queries,
    shard,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the positions per split: a multiple of `shortest` with which all parts fit.

    Splits of positions / spare leave at most `spare` parts besides each sequence's last one.
    `spare` is 0 if the shortest splits always fit.
    """
    split_len = shortest
    if spare > 0:
        held = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, sequences, BLOCK):
            b = start + tl.arange(0, BLOCK)
            held += _held_by(b, sequences, pos_ptr, queries, shard, SHARDS)
        split_len = shortest * tl.maximum(1, tl.cdiv(tl.sum(held, 0), spare * shortest))
    return tl.multiple_of(split_len, 16)


@triton.jit
def count_parts(
    sequences,
    split_len,
    pos_ptr,
    queries,
    shard,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the number of parts of all sequences."""
    parts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, sequences, BLOCK):
        b = start + tl.arange(0, BLOCK)
        parts += _splits_of(b, sequences, split_len, pos_ptr, queries, shard, SHARDS)
    return tl.sum(parts, 0)


@triton.jit
def find_part(
    part,
    sequences,
    split_len,
    pos_ptr,
    queries,
    shard,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the sequence of a part, and the number of its first part."""
    num_before = tl.zeros((BLOCK,), tl.int32)
    parts_before = tl.zeros((BLOCK,), tl.int32)
    end = 0
    for start in range(0, sequences, BLOCK):
        b = start + tl.arange(0, BLOCK)
        splits = _splits_of(b, sequences, split_len, pos_ptr, queries, shard, SHARDS)
        is_before = (b < sequences) & (end + tl.cumsum(splits, 0) <= part)
        num_before += is_before.to(tl.int32)
        parts_before += tl.where(is_before, splits, 0)
        end += tl.sum(splits, 0)
    return tl.sum(num_before, 0), tl.sum(parts_before, 0)
