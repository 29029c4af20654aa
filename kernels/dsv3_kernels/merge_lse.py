"""Softmax with its log-sum-exp, and the exact merge of attention over disjoint sets of keys."""

import torch
from torch import Tensor

from dsv3_kernels._triton import tl, triton, use_triton

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


@triton.jit(do_not_specialize=["num_parts", "heads", "block_rows"])
def _merge_lse_kernel(
    o_part,
    lse_part,
    o_out,
    lse_out,
    pos_ptr,  # position of each query; not read if SPLIT is 0
    num_parts,  # not used otherwise
    heads,
    block_rows,  # rows of a block of the batch; the third strides step over blocks
    o_stride_part,
    o_stride_row,
    o_stride_block,
    lse_stride_part,
    lse_stride_row,
    lse_stride_block,
    V: tl.constexpr,
    SHARDS: tl.constexpr,
    SHARD: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program merges a row's parts, PARTS at a time, in their order."""
    row = tl.program_id(0).to(tl.int64)
    if SPLIT > 0:
        pos = tl.load(pos_ptr + row // heads).to(tl.int32)
        num_parts = ((pos + SHARDS - SHARD) // SHARDS + SPLIT - 1) // SPLIT
    block, in_block = row // block_rows, row % block_rows
    o_row = o_part + block * o_stride_block + in_block * o_stride_row
    lse_row = lse_part + block * lse_stride_block + in_block * lse_stride_row
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
    tl.store(o_out + row * V + v, acc / divisor, mask=v < V)
    if tl.program_id(1) == 0:
        tl.store(lse_out + row, best + tl.log(divisor))


def merge_lse_triton(o_NTHV: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Launch a program per row and block of values."""
    N, T, H, V = o_NTHV.shape
    assert o_NTHV.stride(-1) == 1, f"{o_NTHV.stride()=}"
    strides = [s.stride(i) for s in (o_NTHV, lse_NTH) for i in (0, 2, 1)]
    return _launch(o_NTHV, lse_NTH, (T, H, V), strides, (lse_NTH, N, H, H), (1, 0, 0))


def merge_splits_triton(
    o_BNRV: Tensor, lse_BNR: Tensor, query_pos_BQ: Tensor, shards: int, shard: int, split: int
) -> tuple[Tensor, Tensor]:
    """Merge what R = Q * H rows of a sequence got from each `split` of the positions held here.

    Splits behind a query's position are not read: nobody need have written them.

    Returns:
        o_BRV, lse_BR.
    """
    (B, _, R, V), Q = o_BNRV.shape, query_pos_BQ.shape[1]
    strides = [s.stride(i) for s in (o_BNRV, lse_BNR) for i in (1, 2, 0)]
    sizes = query_pos_BQ, 0, R // Q, R
    return _launch(o_BNRV, lse_BNR, (B, R, V), strides, sizes, (shards, shard, split))


def _launch(
    o: Tensor,
    lse: Tensor,
    shape: tuple[int, int, int],
    strides: list[int],
    sizes: tuple[Tensor, int, int, int],
    paging: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    out = o.new_empty(shape, dtype=torch.float32)
    out_lse = out.new_empty(shape[:2])
    rows, V = shape[0] * shape[1], shape[2]
    block = min(128, triton.next_power_of_2(V))
    if rows:
        _merge_lse_kernel[(rows, triton.cdiv(V, block))](
            o, lse, out, out_lse, *sizes, *strides, V, *paging, _PARTS, block, num_warps=2
        )
    return out, out_lse


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
