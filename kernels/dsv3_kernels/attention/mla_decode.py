"""MLA in its absorbed form: attention to the cached latents themselves.

All heads and new tokens of a sequence share its keys, so they are the rows of one tile: the cache
is read once for up to 16, 32 or 64 of them. A program takes one tile, one sequence and some splits
of the positions held here; splits are merged in their order. In float32 they are of fixed length,
so a sequence's result depends on nothing else in the batch; otherwise they are shorter where there
are too few to keep a GPU busy, which changes no more than roundings.

What bounds it, on an H100: with 16 heads (30 FLOPs a byte) cache bytes; a split of 512 positions
writes 5.5 % of what it reads, and one program runs it at its multiprocessor's share of bandwidth.
With 64 rows and more FLOPs: 64 rows of float32 output are half of a multiprocessor's registers,
their queries and two blocks of 64 keys all of its shared memory, so 128 heads are two programs
side by side that find each other's keys in L2, and one block's softmax waits for its product.
Loads come a page table's entry ahead, as asynchronous copies.
"""

import math

import torch
from torch import Tensor

from dsv3_kernels._triton import (
    in_turn,
    is_hopper,
    is_interpreted,
    launch_options,
    multiprocessors,
    tl,
    triton,
    use_triton,
)
from dsv3_kernels.attention._decode_tiles import (
    Tile,
    programs_for,
    sequences_for,
    split_for,
    tile_for,
)
from dsv3_kernels.attention.kv_fp8 import BLOCK, unpack_latent
from dsv3_kernels.attention.merge_lse import merge_splits_triton, softmax_lse
from dsv3_kernels.attention.paging import Keys, Paging
from dsv3_kernels.gemm._e4m3 import decode_e4m3, is_native

# Values held at a time by the reference: 4 MiB of float32, which a processor's cache holds.
_SCORES = 1 << 20


def mla_decode_ref(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    value_dim: int,
    scale: float,
    keys: Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """Define `mla_decode`."""
    B, Q, H, X = q_BQHX.shape
    keys = keys or paging.keys(page_BG, query_pos_BQ)
    sequences, width = (q_BQHX, keys.slot_BS, query_pos_BQ), len(keys.key_pos_S)
    step = max(1, _SCORES // max(1, width * max(Q * H, X)))
    if step >= B:
        return _attend(cache_SX, keys.key_pos_S, value_dim, scale, *sequences)
    blocks = zip(*(x.split(step) for x in sequences), strict=True)
    parts = [_attend(cache_SX, keys.key_pos_S, value_dim, scale, *block) for block in blocks]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend(
    cache_SX: Tensor,
    key_pos_S: Tensor,
    value_dim: int,
    scale: float,
    q_BQHX: Tensor,
    slot_BS: Tensor,
    query_pos_BQ: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do the same for so few sequences that all they look at is held at once."""
    B, Q, H, _ = q_BQHX.shape
    kv = cache_SX.index_select(0, slot_BS.flatten())
    if kv.dtype == torch.uint8:
        kv = unpack_latent(kv, value_dim, torch.float32)
    kv_BSX = kv.float().view(B, -1, kv.shape[-1])
    q = q_BQHX.flatten(1, 2).float() * scale
    score_BQHS = torch.bmm(q, kv_BSX.transpose(1, 2)).view(B, Q, H, -1)
    hidden_BQS = key_pos_S > query_pos_BQ.unsqueeze(2)
    p, lse = softmax_lse(score_BQHS.masked_fill_(hidden_BQS.unsqueeze(2), float("-inf")))
    out = torch.bmm(p.flatten(1, 2), kv_BSX[..., :value_dim])
    return out.view(B, Q, H, -1), lse


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
    """Return latents [KEYS, C_PAD]; packed ones are e4m3 times the scale of each block of 128."""
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
    "lse_stride_owner",
    "lse_stride_split",
    "pages",
    "queries",
    "num_rows",
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
    stride_latent,
    stride_scale,
    stride_rope,
    q_stride_owner,
    o_stride_owner,
    o_stride_split,
    lse_stride_owner,
    lse_stride_split,
    pages,
    queries,
    num_rows,
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
    SHARD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: ROWS of a sequence's Q * H queries, some splits of the positions held here.

    Every HEADS of the H heads are another rank's, and lie together with its other tokens'.
    """
    in_turn()
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, r = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
    is_c, is_r, is_row = c < C, r < R, row < num_rows
    query_pos = tl.load(pos_ptr + b * queries + row // H, mask=is_row, other=-1).to(tl.int32)
    # Positions held here that some row of the program sees.
    seen = (tl.max(query_pos, 0) + SHARDS - SHARD) // SHARDS
    needed = tl.maximum(1, tl.cdiv(seen, SPLIT))
    if tl.program_id(1) < needed:
        owner, owned, own = row % H // HEADS, row // H * HEADS + row % HEADS, b * queries * HEADS
        q_at = owner.to(tl.int64) * q_stride_owner + owned * (C + R)
        q_row = q_ptr + own * (C + R) + q_at[:, None]
        q_c = tl.load(q_row + c[None, :], mask=is_row[:, None] & is_c[None, :], other=0.0).to(DTYPE)
        q_r = tl.load(q_row + C + r[None, :], mask=is_row[:, None] & is_r[None, :], other=0.0)
        q_r = q_r.to(DTYPE)
        for split in range(tl.program_id(1), needed, tl.num_programs(1)):
            top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, C_PAD), tl.float32)
            for start in range(split * SPLIT, min((split + 1) * SPLIT, seen), KEYS):
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
                is_seen = (at * SHARDS + SHARD)[None, :] <= query_pos[:, None]
                score = score * scale_log2 + score_r * scale_log2
                score = tl.where(is_seen, score, float("-inf"))
                # Always so. What an `if` hands out hides from the compiler that these scores feed
                # the next product, for whose sake both warp groups would compute all of them.
                # (Triton 3.6 cannot compile one that also hides the use of the first products.)
                p, decay = score, total
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
            part_at = split * o_stride_split.to(tl.int64)
            at = owner.to(tl.int64) * o_stride_owner + owned * O_ROW
            o_at = o_ptr + own * O_ROW + part_at + at[:, None] + c[None, :]
            o = (acc / divisor[:, None]).to(o_ptr.dtype.element_ty)
            tl.store(o_at, o, mask=is_row[:, None] & is_c[None, :])
            at = split * lse_stride_split + owner * lse_stride_owner + (own + owned) * LSE_ROW
            tl.store(lse_ptr + at, (top + tl.log2(divisor)) * 0.6931471805599453, mask=is_row)


def mla_decode_triton(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    value_dim: int,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `mla_decode`."""
    B, Q, H, X = q_BQHX.shape
    q_PTHX = q_BQHX.contiguous().view(1, B * Q, H, X)
    o = torch.empty(B, Q, H, value_dim, dtype=torch.float32, device=q_BQHX.device)
    lse = o.new_empty(B, Q, H)
    out = o.view(1, B * Q, H, value_dim), lse.view(1, B * Q, H)
    launch_decode(q_PTHX, cache_SX, page_BG, query_pos_BQ, paging, scale, out, tile)
    return o, lse


def launch_decode(
    q_PTHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    scale: float,
    out: tuple[Tensor, Tensor],
    tile: Tile | None,
) -> None:
    """Launch a program per tile of rows, split and sequence; merge the splits into `out`.

    Queries and `out` are of P ranks' heads, [P, T, H, ...] (`mla_decode_parts`). Many sequences
    with wide tables go one part after the other.
    """
    (P, T, heads, X), (B, Q), C = q_PTHX.shape, query_pos_BQ.shape, out[0].shape[-1]
    G, rows, is_packed = page_BG.shape[1], Q * P * heads, cache_SX.dtype == torch.uint8
    assert cache_SX.stride(1) == 1 and q_PTHX[0].is_contiguous(), f"{cache_SX.stride()=}"
    assert T == B * Q and (C % 4 == 0 or not is_packed), f"{q_PTHX.shape=} {page_BG.shape=} {C=}"
    page_BG, query_pos_BQ = page_BG.contiguous(), query_pos_BQ.contiguous()
    is_exact = torch.float32 in (q_PTHX.dtype, cache_SX.dtype) or is_interpreted(cache_SX)
    held = G * paging.slots_per_page
    if tile is None:
        tile = tile_for(rows, is_exact, is_hopper(q_PTHX))
        if not is_exact:
            programs = triton.cdiv(rows, tile.rows) * B
            split = split_for(tile.split, programs, held, multiprocessors(q_PTHX)[0])
            tile = tile._replace(split=split)
    splits, tiles = triton.cdiv(held, tile.split), triton.cdiv(rows, tile.rows)
    if (step := sequences_for(splits, rows * C)) < B and splits > 1:
        for b in range(0, B, step):
            at, t = slice(b, b + step), slice(b * Q, (b + step) * Q)
            where, some = (page_BG[at], query_pos_BQ[at]), (out[0][:, t], out[1][:, t])
            launch_decode(q_PTHX[:, t], cache_SX, *where, paging, scale, some, tile)
        return
    o_NPTHC, lse_NPTH = (x.unsqueeze(0) for x in out)
    if splits > 1:
        shape = splits, P, T, heads
        o_NPTHC = torch.empty(*shape, C, dtype=torch.float32, device=q_PTHX.device)
        lse_NPTH = o_NPTHC.new_empty(shape)
    if not B:
        return
    tensors = page_BG, query_pos_BQ, o_NPTHC, lse_NPTH
    strides = q_PTHX.stride(0), *(t.stride(i) for t in tensors[2:] for i in (1, 0))
    rows_of = o_NPTHC.stride(3), lse_NPTH.stride(3)
    sizes = G, Q, rows, scale * math.log2(math.e), P * heads, heads, *rows_of, C, X - C
    places = paging.slots_per_page, paging.shards, paging.shard
    grid = tiles, programs_for(splits, tiles * B), B
    scale_Sc, rope_SR = _parts_of(cache_SX, C) if is_packed else (cache_SX, cache_SX[:, C:])
    caches = cache_SX, scale_Sc, rope_SR
    _mla_decode_kernel[grid](
        *(q_PTHX, *caches, *tensors, *(x.stride(0) for x in caches), *strides, *sizes),
        *(max(16, triton.next_power_of_2(C)), max(16, triton.next_power_of_2(X - C))),
        *(*places, *tile[:3]),
        *(is_packed, is_native(cache_SX), tl.float32 if is_exact else tl.bfloat16),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(),
    )
    if splits > 1:
        merge_splits_triton((o_NPTHC, lse_NPTH), query_pos_BQ, paging, tile.split, out)


def _parts_of(cache_SX: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return views of a packed cache: scales of the latents' blocks, and rotated keys."""
    end = value_dim + 4 * -(-value_dim // BLOCK)
    return cache_SX[:, value_dim:end].view(torch.float32), cache_SX[:, end:].view(torch.bfloat16)


def mla_decode(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    value_dim: int,
    scale: float,
    keys: Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to cached latents, all heads sharing one key (the absorbed form).

    A key is a whole cache entry (latent, then rotated key), its value the latent in front.

    Args:
        q_BQHX: [B, Q, H, C + R] absorbed queries of B sequences.
        cache_SX: [slots, C + R], one layer of this rank's cache; uint8 for the packed FP8 form.
        page_BG: [B, G] int32 pages of each sequence, filled up with page 0.
        query_pos_BQ: [B, Q] int64 positions; a query sees keys up to its own, so none at -1.
        paging: which of the positions this rank holds, and where.
        value_dim: C.
        scale: multiplies the scores.
        keys: `paging.keys` of these tables, if the caller has them already; saves the reference
            spelling them out in every layer.

    Returns:
        o_BQHC: [B, Q, H, C] float32, 0 where a query sees no key.
        lse_BQH: [B, Q, H] float32, -inf there.

    Source: DeepSeek-V2 paper, 2.1.2 and appendix C (absorption of W_UK and W_UV).
    """
    args = q_BQHX, cache_SX, page_BG, query_pos_BQ, paging, value_dim, scale
    return mla_decode_triton(*args) if use_triton(q_BQHX) else mla_decode_ref(*args, keys)
