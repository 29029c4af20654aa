"""The kernel of `mla_decode`.

All heads and new tokens of a sequence share its keys, so they are the rows of one tile: the cache
is read once for up to 16, 32 or 64 rows. A program computes one tile of one sequence over a split
of this rank's positions, then another; splits are merged in order. In float32 splits have a fixed
length, so a sequence's result does not depend on the rest of the batch; otherwise they are shorter
if there are too few to keep a GPU busy and longer if their results would take too much memory,
which changes only roundings.

Bound on an H100: with 16 heads (30 FLOPs per byte) by cache bytes; a split of 512 positions writes
5.5 % of the bytes it reads, and one program runs it at its multiprocessor's share of bandwidth.
From 64 rows on by FLOPs: 64 rows of float32 output take half of a multiprocessor's registers, their
queries and two blocks of 64 keys all of its shared memory, so 128 heads are two programs that find
each other's keys in L2, and the softmax of a block waits for its product. Loads are asynchronous
copies, one entry of the page table ahead.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import (
    in_turn,
    is_hopper,
    is_interpreted,
    launch_gpu,
    launch_options,
    tl,
    triton,
)
from dsv3_kernels.attention._decode_tiles import (
    Tile,
    numbered_at_once,
    pool_for,
    programs_for,
    split_for,
    tile_for,
)
from dsv3_kernels.attention._numbered_parts import count_parts, find_part, split_length
from dsv3_kernels.attention.kv_fp8 import packed_views
from dsv3_kernels.attention.merge_lse import log_sum_exp, merge_splits
from dsv3_kernels.attention.paging import PageTables
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.gemm._e4m3 import decode_e4m3, is_native

# Values of a sequence's queries, or of their outputs: the kernel counts them in 32 bits.
_MOST_VALUES = 2**31 - 1


@triton.jit
def _as_numbers(
    code,
    scale_at,
    held,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return latents [KEYS, C_PAD]; packed latents are e4m3 times the scale of a block of 128."""
    if PACKED:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) if NATIVE else decode_e4m3(code)
        KEYS: tl.constexpr = code.shape[0]
        BLOCK: tl.constexpr = code.shape[1] if code.shape[1] < 128 else 128
        BLOCKS: tl.constexpr = code.shape[1] // BLOCK
        block = tl.arange(0, BLOCKS)
        known = held[:, None] & (block < (C + 127) // 128)[None, :]
        scale = tl.load(scale_at[:, None] + block[None, :], mask=known, other=0.0)
        value = tl.reshape(value, (KEYS, BLOCKS, BLOCK)) * scale[:, :, None]
        return tl.reshape(value, code.shape).to(DTYPE)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return code.to(DTYPE)


_VARY = (
    "page_ptr",
    "pos_ptr",
    "first_ptr",
    "lse_stride_owner",
    "pages",
    "sequences",
    "queries",
    "num_rows",
    "spare",
    "shard",
)


@triton.jit(do_not_specialize=_VARY)
def _mla_decode_kernel(
    q_ptr,
    latent_ptr,
    scale_ptr,
    rope_ptr,
    page_ptr,
    pos_ptr,
    o_ptr,
    lse_ptr,
    first_ptr,
    stride_latent,
    stride_scale,
    stride_rope,
    q_stride_owner,
    o_stride_owner,
    lse_stride_owner,
    pages,
    sequences,
    queries,
    num_rows,
    shortest,  # positions of the shortest split, a multiple of KEYS and 16
    spare,  # see `Pool`
    shard,
    scale_log2,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    O_ROW: tl.constexpr,
    LSE_ROW: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    C_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    SHARDS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute ROWS of a sequence's Q * H queries over a split of this rank's positions.

    The H heads belong to ranks, HEADS each; the queries of one rank are contiguous. Writes the
    number of each sequence's first part, and the number of all parts.
    """
    in_turn()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C_PAD)
    r = tl.arange(0, R_PAD)
    is_c = c < C
    is_r = r < R
    is_row = row < num_rows
    owner = row % H // HEADS
    owned = row // H * HEADS + row % HEADS
    split_len = split_length(shortest, spare, sequences, pos_ptr, queries, shard, SHARDS, AT_ONCE)
    num_parts = count_parts(sequences, split_len, pos_ptr, queries, shard, SHARDS, AT_ONCE)
    tl.store(first_ptr + sequences, num_parts)
    step = tl.num_programs(1)
    # Values of the tile kept in registers over all parts would displace the accumulators.
    for part in tl.range(tl.program_id(1), num_parts, step, disable_licm=True):
        b, first = find_part(part, sequences, split_len, pos_ptr, queries, shard, SHARDS, AT_ONCE)
        tl.store(first_ptr + b, first)
        b = b.to(tl.int64)
        query_pos = tl.load(pos_ptr + b * queries + row // H, mask=is_row, other=-1).to(tl.int32)
        # Positions of this rank that any row of the program sees; maybe none of this split.
        seen = (tl.max(query_pos, 0) + SHARDS - shard) // SHARDS
        split = part - first
        q_at = owner.to(tl.int64) * q_stride_owner + owned * (C + R)
        q_row = q_ptr + b * queries * HEADS * (C + R) + q_at[:, None]
        q_c = tl.load(q_row + c[None, :], mask=is_row[:, None] & is_c[None, :], other=0.0).to(DTYPE)
        q_r = tl.load(q_row + C + r[None, :], mask=is_row[:, None] & is_r[None, :], other=0.0)
        q_r = q_r.to(DTYPE)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, C_PAD), tl.float32)
        for start in range(split * split_len, min((split + 1) * split_len, seen), KEYS):
            at = start + tl.arange(0, KEYS)
            held = at < seen
            page = tl.load(page_ptr + b * pages + at // PAGE, mask=held, other=0).to(tl.int64)
            slot = page * PAGE + at % PAGE
            scale_at = scale_ptr + slot * stride_scale
            latent_at = latent_ptr + (slot * stride_latent)[:, None] + c[None, :]
            latent = tl.load(latent_at, mask=held[:, None] & is_c[None, :], other=0)
            latent = _as_numbers(latent, scale_at, held, C, PACKED, NATIVE, DTYPE)
            rope_at = rope_ptr + (slot * stride_rope)[:, None] + r[None, :]
            rope = tl.load(rope_at, mask=held[:, None] & is_r[None, :], other=0.0).to(DTYPE)
            score = tl.dot(q_c, tl.trans(latent), input_precision="ieee")
            score_r = tl.dot(q_r, tl.trans(rope), input_precision="ieee")
            is_seen = (at * SHARDS + shard)[None, :] <= query_pos[:, None]
            score = score * scale_log2 + score_r * scale_log2
            score = tl.where(is_seen, score, float("-inf"))
            # Always true. Values assigned in an `if` hide from the compiler that these scores
            # feed the next product; otherwise both warp groups would compute all scores.
            # (Triton 3.6 cannot compile an `if` that also contains the first products.)
            p = score
            decay = total
            if pages > 0:
                best = tl.maximum(top, tl.max(score, 1))
                shift = tl.where(best == float("-inf"), 0.0, best)
                p = tl.exp2(score - shift[:, None])
                decay = tl.exp2(top - shift)
                total = total * decay + tl.sum(p, 1)
                top = best
            acc = acc * decay[:, None]
            acc = tl.dot(p.to(DTYPE), latent, acc, input_precision="ieee")
        divisor = tl.where(total == 0.0, 1.0, total)
        own = queries.to(tl.int64) * HEADS * part
        at = owner.to(tl.int64) * o_stride_owner + owned * O_ROW
        o_at = o_ptr + own * O_ROW + at[:, None] + c[None, :]
        o = (acc / divisor[:, None]).to(o_ptr.dtype.element_ty)
        tl.store(o_at, o, mask=is_row[:, None] & is_c[None, :])
        at = owner.to(tl.int64) * lse_stride_owner + (own + owned) * LSE_ROW
        tl.store(lse_ptr + at, log_sum_exp(top, divisor), mask=is_row)


def launch_decode(
    q_PTHX: Tensor,
    cache_SX: Tensor,
    tables: PageTables,
    scale: float,
    out: PartialOutputs,
    tile: Tile | None,
) -> None:
    """Launch programs for each tile of rows and part; merge the parts into `out`.

    Where splits have a fixed length, groups of sequences are launched in turn if the parts of all
    could take too much memory; otherwise splits become longer. Queries of a sequence are launched
    in turn beyond `_MOST_VALUES`.

    Args:
        q_PTHX: [P, T, heads, C + R] queries of P ranks' heads, T = B * Q.
        cache_SX: see `mla_decode`.
        tables: of B sequences.
        scale: multiplies the scores.
        out: o [P, T, heads, C] and lse [P, T, heads], to be written.
        tile: shape of the programs; None for the best one.
    """
    P, T, heads, _ = q_PTHX.shape
    B, Q = tables.query_pos_BQ.shape
    C = out.o.shape[-1]
    rows = Q * P * heads
    is_packed = cache_SX.dtype == torch.uint8
    assert cache_SX.stride(1) == 1 and q_PTHX[0].is_contiguous(), f"{cache_SX.stride()=}"
    assert T == B * Q and (C % 4 == 0 or not is_packed), f"{q_PTHX.shape=} {B=} {Q=} {C=}"
    is_fixed = torch.float32 in (q_PTHX.dtype, cache_SX.dtype)
    is_exact = is_fixed or is_interpreted(cache_SX)
    if not B:
        return
    if tile is None:
        tile = _best_tile(q_PTHX, rows, B, tables.capacity, is_exact)
    splits = cdiv(tables.capacity, tile.split)
    pool = pool_for(B, splits, rows * C, is_fixed)
    most = B * Q if splits == 1 else pool.sequences * Q
    most_of_one = _MOST_VALUES // (heads * max(q_PTHX.shape[3], out.o.stride(2)))
    if most_of_one < Q:
        most = most_of_one
    if most < B * Q:
        for t, some in tables.blocks(most):
            of_some = PartialOutputs(out.o[:, t], out.lse[:, t])
            launch_decode(q_PTHX[:, t], cache_SX, some, scale, of_some, tile)
        return
    tables = tables.contiguous()
    first_B = torch.empty(B + 1, dtype=torch.int32, device=q_PTHX.device)
    if splits == 1:
        _launch_parts(q_PTHX, cache_SX, tables, scale, out, first_B, tile, 0, is_exact)
        return
    shape = P, pool.parts * Q, heads, C
    o_PTHC = torch.empty(shape, dtype=torch.float32, device=q_PTHX.device)
    parts = PartialOutputs(o_PTHC, o_PTHC.new_empty(shape[:-1]))
    _launch_parts(q_PTHX, cache_SX, tables, scale, parts, first_B, tile, pool.spare, is_exact)
    merge_splits(parts, first_B, Q, out)


def _best_tile(q_PTHX: Tensor, rows: int, sequences: int, capacity: int, is_exact: bool) -> Tile:
    """Return the tile for a number of rows of each of `sequences` of `capacity` positions."""
    tile = tile_for(rows, is_exact, is_hopper(q_PTHX))
    if is_exact:
        return tile
    programs = cdiv(rows, tile.rows) * sequences
    split = split_for(tile.split, programs, capacity, launch_gpu(q_PTHX).multiprocessors)
    return replace(tile, split=split)


def _launch_parts(
    q_PTHX: Tensor,
    cache_SX: Tensor,
    tables: PageTables,
    scale: float,
    parts: PartialOutputs,
    first_B: Tensor,
    tile: Tile,
    spare: int,
    is_exact: bool,
) -> None:
    """Launch the kernel; `parts` are o [P, N * Q, heads, C] and lse [P, N * Q, heads]."""
    B, Q = tables.query_pos_BQ.shape
    P, T, heads, C = parts.o.shape
    R = q_PTHX.shape[-1] - C
    rows = Q * P * heads
    tiles = cdiv(rows, tile.rows)
    is_packed = cache_SX.dtype == torch.uint8
    scale_Sc = cache_SX
    rope_SR = cache_SX[:, C:]
    if is_packed:
        scale_Sc, rope_SR = packed_views(cache_SX, C)
    _mla_decode_kernel[(tiles, programs_for(T // Q, tiles, B))](
        q_ptr=q_PTHX,
        latent_ptr=cache_SX,
        scale_ptr=scale_Sc,
        rope_ptr=rope_SR,
        page_ptr=tables.page_BG,
        pos_ptr=tables.query_pos_BQ,
        o_ptr=parts.o,
        lse_ptr=parts.lse,
        first_ptr=first_B,
        stride_latent=cache_SX.stride(0),
        stride_scale=scale_Sc.stride(0),
        stride_rope=rope_SR.stride(0),
        q_stride_owner=q_PTHX.stride(0),
        o_stride_owner=parts.o.stride(0),
        lse_stride_owner=parts.lse.stride(0),
        pages=tables.page_BG.shape[1],
        sequences=B,
        queries=Q,
        num_rows=rows,
        shortest=tile.split,
        spare=spare,
        shard=tables.paging.shard,
        scale_log2=scale * math.log2(math.e),
        H=P * heads,
        HEADS=heads,
        O_ROW=parts.o.stride(2),
        LSE_ROW=parts.lse.stride(2),
        C=C,
        R=R,
        C_PAD=max(16, next_power_of_2(C)),
        R_PAD=max(16, next_power_of_2(R)),
        PAGE=tables.paging.slots_per_page,
        SHARDS=tables.paging.shards,
        ROWS=tile.rows,
        KEYS=tile.keys,
        AT_ONCE=numbered_at_once(B),
        PACKED=is_packed,
        NATIVE=is_native(cache_SX),
        DTYPE=tl.float32 if is_exact else tl.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(),
    )
