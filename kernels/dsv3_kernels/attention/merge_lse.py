"""Softmax with its log-sum-exp, and the exact merge of partial outputs over disjoint keys."""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.operation import operation

# Parts that the kernel merges at a time. Constant, so that the order of a sum depends only on the
# number of a row's parts.
_PARTS = 32


@triton.jit
def log_sum_exp(top, divisor):
    """Return the natural log-sum-exp of scores in base 2: their maximum, the sum of 2^(s - top)."""
    return (top + tl.log2(divisor)) * 0.6931471805599453


def softmax(score: Tensor, is_empty: Tensor | None = None) -> Tensor:
    """Return the softmax over the last dim.

    Args:
        score: [..., S] scores; -inf where a key is not seen.
        is_empty: [...] True for rows of only -inf, whose result is 0; None if there are none.
    """
    p = score.softmax(-1)
    return p if is_empty is None else p.masked_fill_(is_empty.unsqueeze(-1), 0.0)


def softmax_lse(score: Tensor, is_empty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `softmax` and the log-sum-exp over the last dim, -inf for empty rows."""
    p = softmax(score, is_empty)
    # The largest probability is exp(largest score - lse).
    lse = score.amax(-1).sub_(p.amax(-1).log_())
    return p, lse if is_empty is None else lse.masked_fill_(is_empty, float("-inf"))


def merge_values(o_NTHV: Tensor, lse_NTH: Tensor) -> Tensor:
    """Return the merged outputs of `merge_lse`, without their log-sum-exp."""
    # Where no part has keys, the softmax of -inf alone is NaN.
    weight_NTH = lse_NTH.softmax(0).nan_to_num_(0.0)
    return (o_NTHV * weight_NTH.unsqueeze(-1)).sum(0)


# Strides of values are specialized: if they allow it, 16 bytes are read at a time.
_LSE = "lse_stride_block", "lse_stride_row", "lse_stride_part"
_OUT = "lse_out", "out_lse_stride_block", "out_lse_stride_row"


@triton.jit(do_not_specialize=["first_ptr", "num_parts", "block_rows", "part_rows", *_LSE, *_OUT])
def _merge_lse_kernel(
    o_part,
    lse_part,
    o_out,
    lse_out,
    first_ptr,  # number of each sequence's first part, and of all parts; read if NUMBERED
    num_parts,  # not used if NUMBERED
    block_rows,  # rows of the result per block; strides are given for blocks and for rows
    part_rows,  # rows of a part per block
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
    V: tl.constexpr,
    NUMBERED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the parts of a row, PARTS at a time, in order."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    block = row // block_rows
    row = row % block_rows
    first = tl.zeros((), tl.int64)
    if NUMBERED:
        first_at = first_ptr + row // part_rows
        first = tl.load(first_at).to(tl.int64)
        num_parts = (tl.load(first_at + 1) - first).to(tl.int32)
    part_row = row % part_rows
    o_row = o_part + block * o_stride_block + first * o_stride_part + part_row * o_stride_row
    lse_row = lse_part + block * lse_stride_block
    lse_row += first * lse_stride_part + part_row * lse_stride_row
    part = tl.arange(0, PARTS).to(tl.int64)
    top = tl.full((PARTS,), float("-inf"), tl.float32)
    for start in range(0, num_parts, PARTS):
        at = lse_row + (start + part) * lse_stride_part
        top = tl.maximum(top, tl.load(at, mask=start + part < num_parts, other=float("-inf")))
    best = tl.max(top, 0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.zeros((PARTS,), tl.float32), 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, PARTS):
        held = start + part < num_parts
        at = lse_row + (start + part) * lse_stride_part
        weight = tl.exp(tl.load(at, mask=held, other=float("-inf")) - shift)
        o_at = o_row + ((start + part) * o_stride_part)[:, None] + v[None, :]
        o = tl.load(o_at, mask=held[:, None] & (v < V)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * o, 0)
        total += tl.sum(weight, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    out = o_out + block * out_stride_block + row * out_stride_row
    tl.store(out + v, (acc / divisor).to(o_out.dtype.element_ty), mask=v < V)
    if tl.program_id(1) == 0:
        at = lse_out + block * out_lse_stride_block + row * out_lse_stride_row
        tl.store(at, best + tl.log(divisor))


def _launch(parts: PartialOutputs, first_B: Tensor | None, out: PartialOutputs) -> None:
    """Merge [N, blocks, part rows, V] and [N, blocks, part rows] into `out`.

    Args:
        parts: averages and log-sum-exp.
        first_B: number of the first part of each sequence, and of all parts; None to merge all N.
        out: [blocks, rows, V] and [blocks, rows]; each sequence has as many rows as a part.
    """
    N, blocks, part_rows, V = parts.o.shape
    rows = out.o.shape[1]
    assert parts.o.stride(-1) == out.o.stride(-1) == 1, f"{parts.o.stride()=} {out.o.stride()=}"
    block = min(128, next_power_of_2(V))
    if blocks * rows:
        _merge_lse_kernel[(blocks * rows, cdiv(V, block))](
            o_part=parts.o,
            lse_part=parts.lse,
            o_out=out.o,
            lse_out=out.lse,
            first_ptr=parts.lse if first_B is None else first_B,
            num_parts=N,
            block_rows=rows,
            part_rows=part_rows,
            o_stride_block=parts.o.stride(1),
            o_stride_row=parts.o.stride(2),
            o_stride_part=parts.o.stride(0),
            lse_stride_block=parts.lse.stride(1),
            lse_stride_row=parts.lse.stride(2),
            lse_stride_part=parts.lse.stride(0),
            out_stride_block=out.o.stride(0),
            out_stride_row=out.o.stride(1),
            out_lse_stride_block=out.lse.stride(0),
            out_lse_stride_row=out.lse.stride(1),
            V=V,
            NUMBERED=first_B is not None,
            PARTS=_PARTS,
            BLOCK=block,
            num_warps=2,
            **launch_options(),
        )


def merge_splits(parts: PartialOutputs, first_B: Tensor, queries: int, out: PartialOutputs) -> None:
    """Merge the parts of each sequence, by the kernel.

    Parts after the last sequence's are not read and may be uninitialized.

    Args:
        parts: o [P, N * Q, H, V] and lse [P, N * Q, H], float32, of N parts.
        first_B: [B + 1] int32 number of each sequence's first part, and of all parts.
        queries: Q.
        out: o [P, T, H, V], any float dtype, and lse [P, T, H] float32, to be written, T = B * Q;
            heads of a token and tokens are contiguous.
    """
    by_part = (-1, queries)
    o_NPRV = parts.o.unflatten(1, by_part).flatten(2, 3).transpose(0, 1)
    lse_NPR = parts.lse.unflatten(1, by_part).flatten(2, 3).transpose(0, 1)
    merged = PartialOutputs(out.o.flatten(1, 2), out.lse.flatten(1, 2))
    _launch(PartialOutputs(o_NPRV, lse_NPR), first_B, merged)


def _launch_merge_lse(o_NTHV: Tensor, lse_NTH: Tensor) -> PartialOutputs:
    """Launch a program per row and block of values."""
    o_THV = o_NTHV.new_empty(o_NTHV.shape[1:], dtype=torch.float32)
    out = PartialOutputs(o_THV, o_THV.new_empty(o_THV.shape[:-1]))
    _launch(PartialOutputs(o_NTHV, lse_NTH), None, out)
    return out


@operation(kernel=_launch_merge_lse)
def merge_lse(o_NTHV: Tensor, lse_NTH: Tensor) -> PartialOutputs:
    """Merge N partial outputs: o = sum_n exp(lse_n - lse) o_n.

    Args:
        o_NTHV: [N, T, H, V] float32, each a softmax average over its own keys.
        lse_NTH: [N, T, H] float32 log-sum-exp of its scores; -inf (with o = 0) without keys.

    Returns:
        o_THV: [T, H, V]; 0 without keys in any part.
        lse_TH: [T, H].
    """
    return PartialOutputs(merge_values(o_NTHV, lse_NTH), lse_NTH.logsumexp(0))
