"""Softmax with its log-sum-exp, and the exact merge of partial outputs over disjoint keys."""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention.paging import PageTables, Paging
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.operation import operation

# Parts that the kernel merges at a time. Constant, so that the order of a sum depends only on the
# number of a row's parts.
_PARTS = 32
# Of calls that merge all parts.
_ONE_RANK = Paging(page_size=1)


def softmax_lse(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and log-sum-exp over the last dim; (0, -inf) for rows of only -inf."""
    top = score.amax(-1)
    has_none = top == float("-inf")
    p = score.softmax(-1)
    # The largest probability is exp(top - lse).
    lse = (top - p.amax(-1).log()).masked_fill_(has_none, float("-inf"))
    return p.masked_fill_(has_none.unsqueeze(-1), 0.0), lse


# Strides of values are specialized: if they allow it, 16 bytes are read at a time.
_LSE = "lse_stride_block", "lse_stride_row", "lse_stride_part"
_OUT = "lse_out", "out_lse_stride_block", "out_lse_stride_row"


@triton.jit(do_not_specialize=["pos_ptr", "num_parts", "block_rows", "shard", *_LSE, *_OUT])
def _merge_lse_kernel(
    o_part,
    lse_part,
    o_out,
    lse_out,
    pos_ptr,  # position of each query; read if BY_POSITION
    num_parts,  # not used if BY_POSITION
    split_len,  # positions of a part, a multiple of 16; used if BY_POSITION
    shard,
    block_rows,  # rows per block; strides are given for blocks and for rows
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
    BY_POSITION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the parts of a row, PARTS at a time, in order."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    block = row // block_rows
    row = row % block_rows
    if BY_POSITION:
        pos = tl.load(pos_ptr + row // HEADS).to(tl.int32)
        num_parts = ((pos + SHARDS - shard) // SHARDS + split_len - 1) // split_len
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


def _launch(
    parts: PartialOutputs,
    out: PartialOutputs,
    query_pos: Tensor,
    heads: int,
    paging: Paging,
    split: int,
) -> None:
    """Merge [N, blocks, rows, V] and [N, blocks, rows] over N into `out`.

    If `split` is 0 all N parts are merged, and `query_pos`, `heads` and `paging` are not used.
    """
    N, blocks, rows, V = parts.o.shape
    assert parts.o.stride(-1) == out.o.stride(-1) == 1, f"{parts.o.stride()=} {out.o.stride()=}"
    block = min(128, triton.next_power_of_2(V))
    if blocks * rows:
        _merge_lse_kernel[(blocks * rows, triton.cdiv(V, block))](
            o_part=parts.o,
            lse_part=parts.lse,
            o_out=out.o,
            lse_out=out.lse,
            pos_ptr=query_pos,
            num_parts=N,
            split_len=split,
            shard=paging.shard,
            block_rows=rows,
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
            HEADS=heads,
            V=V,
            SHARDS=paging.shards,
            BY_POSITION=split > 0,
            PARTS=_PARTS,
            BLOCK=block,
            num_warps=2,
            **launch_options(),
        )


def merge_splits(
    parts: PartialOutputs, tables: PageTables, split: int, out: PartialOutputs
) -> None:
    """Merge the partial outputs of each `split` positions held here, by the kernel.

    Splits after a query's position are not read and may be uninitialized.

    Args:
        parts: o [N, P, T, H, V] and lse [N, P, T, H], float32, of T = B * Q queries.
        tables: of the queries; positions contiguous.
        split: positions per part.
        out: o [P, T, H, V], any float dtype, and lse [P, T, H] float32, to be written; heads of
            a token and tokens are contiguous.
    """
    _launch(
        parts=PartialOutputs(parts.o.flatten(2, 3), parts.lse.flatten(2, 3)),
        out=PartialOutputs(out.o.flatten(1, 2), out.lse.flatten(1, 2)),
        query_pos=tables.query_pos_BQ,
        heads=parts.o.shape[3],
        paging=tables.paging,
        split=split,
    )


def _launch_merge_lse(o_NTHV: Tensor, lse_NTH: Tensor) -> PartialOutputs:
    """Launch a program per row and block of values."""
    o_THV = o_NTHV.new_empty(o_NTHV.shape[1:], dtype=torch.float32)
    out = PartialOutputs(o_THV, o_THV.new_empty(o_THV.shape[:-1]))
    _launch(
        parts=PartialOutputs(o_NTHV, lse_NTH),
        out=out,
        query_pos=lse_NTH,
        heads=1,
        paging=_ONE_RANK,
        split=0,
    )
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
    weight_THN, lse_TH = softmax_lse(lse_NTH.movedim(0, -1))
    o_THV = (o_NTHV * weight_THN.movedim(-1, 0).unsqueeze(-1)).sum(0)
    return PartialOutputs(o_THV, lse_TH)
