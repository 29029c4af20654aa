"""Softmax with its log-sum-exp, and the exact merge of attention over disjoint sets of keys."""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.attention.paging import Paging

# Parts that the kernel weighs at a time. Always the same, so that the order of a sum depends on
# the number of a row's parts only.
_PARTS = 16


def softmax_lse(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and log-sum-exp over the last dim; rows of only -inf give (0, -inf)."""
    top = score.amax(-1)
    has_none = top == float("-inf")
    p = score.softmax(-1)
    # The likeliest one has p = exp(top - lse).
    lse = (top - p.amax(-1).log()).masked_fill_(has_none, float("-inf"))
    return p.masked_fill_(has_none.unsqueeze(-1), 0.0), lse


def merge_lse_ref(o_NTHV: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Define `merge_lse`."""
    weight_THN, lse_TH = softmax_lse(lse_NTH.movedim(0, -1))
    return (o_NTHV * weight_THN.movedim(-1, 0).unsqueeze(-1)).sum(0), lse_TH


# Strides of values are: where they allow it, 16 bytes are read at a time.
_LSE = "lse_stride_block", "lse_stride_row", "lse_stride_part"
_OUT = "lse_out", "out_lse_stride_block", "out_lse_stride_row"


@triton.jit(do_not_specialize=["pos_ptr", "num_parts", "block_rows", *_LSE, *_OUT])
def _merge_lse_kernel(
    o_part,
    lse_part,
    o_out,
    lse_out,
    pos_ptr,  # position of each query; not read if SPLIT is 0
    num_parts,  # not used otherwise
    block_rows,  # rows of a block; the first strides step over blocks, the second over rows
    o_stride_block,
    o_stride_row,
    o_stride_part,
    lse_stride_block,
    lse_stride_row,
    lse_stride_part,
    out_stride_block,
    out_stride_row,
    out_lse_stride_block,
    out_lse_stride_row,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    SHARDS: tl.constexpr,
    SHARD: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program merges a row's parts, PARTS at a time, in their order."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    block, row = row // block_rows, row % block_rows
    if SPLIT > 0:
        pos = tl.load(pos_ptr + row // HEADS).to(tl.int32)
        num_parts = ((pos + SHARDS - SHARD) // SHARDS + SPLIT - 1) // SPLIT
    o_row = o_part + block * o_stride_block + row * o_stride_row
    lse_row = lse_part + block * lse_stride_block + row * lse_stride_row
    part = tl.arange(0, PARTS).to(tl.int64)
    top = tl.full((PARTS,), float("-inf"), tl.float32)
    for first in range(0, num_parts, PARTS):
        at = lse_row + (first + part) * lse_stride_part
        top = tl.maximum(top, tl.load(at, mask=first + part < num_parts, other=float("-inf")))
    best = tl.max(top, 0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.zeros((PARTS,), tl.float32), 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_parts, PARTS):
        held = first + part < num_parts
        at = lse_row + (first + part) * lse_stride_part
        weight = tl.exp(tl.load(at, mask=held, other=float("-inf")) - shift)
        o_at = o_row + ((first + part) * o_stride_part)[:, None] + v[None, :]
        o = tl.load(o_at, mask=held[:, None] & (v < V)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * o, 0)
        total += tl.sum(weight, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    out = o_out + block * out_stride_block + row * out_stride_row
    tl.store(out + v, (acc / divisor).to(o_out.dtype.element_ty), mask=v < V)
    if tl.program_id(1) == 0:
        at = lse_out + block * out_lse_stride_block + row * out_lse_stride_row
        tl.store(at, best + tl.log(divisor))


def merge_lse_triton(o_NTHV: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Launch a program per row and block of values."""
    out = o_NTHV.new_empty(o_NTHV.shape[1:], dtype=torch.float32)
    out_lse = out.new_empty(out.shape[:-1])
    _launch((o_NTHV, lse_NTH), (out, out_lse), (lse_NTH, 1), (1, 0, 0))
    return out, out_lse


def merge_splits_triton(
    parts: tuple[Tensor, Tensor],
    query_pos_BQ: Tensor,
    paging: Paging,
    split: int,
    out: tuple[Tensor, Tensor],
) -> None:
    """Merge what queries got from each `split` of the positions held here.

    Splits behind a query's position are not read: nobody need have written them.

    Args:
        parts: o [N, P, T, H, V] and lse [N, P, T, H], float32, of T = B * Q queries.
        query_pos_BQ: [B, Q], contiguous.
        paging: which positions are held here.
        split: so many of them are one part.
        out: o [P, T, H, V], any float dtype, and lse [P, T, H] float32, to be written; heads of
            a token and tokens follow each other.
    """
    (o, lse), (out_o, out_lse) = parts, out
    flat = out_o.flatten(1, 2), out_lse.flatten(1, 2)
    sizes = query_pos_BQ, o.shape[3]
    _launch((o.flatten(2, 3), lse.flatten(2, 3)), flat, sizes, (paging.shards, paging.shard, split))


def _launch(
    parts: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    queries: tuple[Tensor, int],
    paging: tuple[int, int, int],
) -> None:
    """Merge [N, blocks, rows, V] and [N, blocks, rows] over N into `out`."""
    (N, blocks, rows, V), (pos, heads) = parts[0].shape, queries
    assert parts[0].stride(-1) == out[0].stride(-1) == 1, f"{parts[0].stride()=}"
    strides = [x.stride(i) for x in parts for i in (1, 2, 0)]
    strides += [x.stride(i) for x in out for i in (0, 1)]
    block = min(128, triton.next_power_of_2(V))
    if blocks * rows:
        _merge_lse_kernel[(blocks * rows, triton.cdiv(V, block))](
            *(*parts, *out, pos, N, rows, *strides, heads, V, *paging, _PARTS, block),
            num_warps=2,
            **launch_options(),
        )


def merge_lse(o_NTHV: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Merge N partial attention results: o = sum_n exp(lse_n - lse) o_n.

    Args:
        o_NTHV: [N, T, H, V] float32, each a softmax average over its own keys.
        lse_NTH: [N, T, H] float32 log-sum-exp of its scores; -inf (with o = 0) for no key.

    Returns:
        o_THV: [T, H, V]; 0 where no part had a key.
        lse_TH: [T, H].
    """
    merge = merge_lse_triton if use_triton(o_NTHV) else merge_lse_ref
    return merge(o_NTHV, lse_NTH)
