"""From the projected latent to the cache: normalize, rotate, round, store. Bound by latency.

Four small operations on 576 values a token; one launch instead of six or more.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.attention.kv_fp8 import BLOCK, pack_latent_ref, unpack_latent_ref
from dsv3_kernels.attention.rope import apply_rope
from dsv3_kernels.attention.write_slots import write_slots_ref
from dsv3_kernels.gemm._e4m3 import decode_e4m3, is_native
from dsv3_kernels.gemm.act_quant import quantize_block
from dsv3_kernels.ops.rmsnorm import norm_row, rmsnorm

# What `rope_and_cache` takes.
ToCache = tuple[Tensor, Tensor, float, Tensor, Tensor, bool, Tensor, Tensor, int]
# Of a program: one for every block of V3's latent, and what V3's 1536 query values take alone.
_WARPS = 4


def latent_entries(
    kv_TX: Tensor, weight_C: Tensor, eps: float, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool
) -> Tensor:
    """Return cache entries [T, C + R] before any rounding: normalized latents, rotated keys."""
    C = len(weight_C)
    latent_TC = rmsnorm(kv_TX[:, :C], weight_C, eps)
    return torch.cat((latent_TC, apply_rope(kv_TX[:, C:], cos_Tr, sin_Tr, interleaved)), -1)


def rope_and_cache_ref(
    kv_TX: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    interleaved: bool,
    cache_SX: Tensor,
    slot_T: Tensor,
    keep_from: int,
) -> Tensor:
    """Define `rope_and_cache`."""
    entry_TX = latent_entries(kv_TX, weight_C, eps, cos_Tr, sin_Tr, interleaved)
    if cache_SX.dtype == torch.uint8:
        packed = pack_latent_ref(entry_TX, len(weight_C))
        write_slots_ref(cache_SX, slot_T, packed)
        return unpack_latent_ref(packed[keep_from:], len(weight_C), kv_TX.dtype)
    stored = entry_TX.to(cache_SX.dtype)
    write_slots_ref(cache_SX, slot_T, stored)
    return stored[keep_from:].to(kv_TX.dtype)


@triton.jit(do_not_specialize=["keep_from"])
def _rope_and_cache_kernel(
    kv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    latent_ptr,
    scale_ptr,
    rope_ptr,
    kept_ptr,
    stride_kv,
    stride_latent,
    stride_scale,
    stride_rope,
    keep_from,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    C_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
    x_ptr,
    x_weight_ptr,
    h_ptr,
    q_ptr,
    q_scale_ptr,
    stride_x,
    A,
    B: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """One program makes and stores a token's entry; with B, another normalizes a row of B x 128.

    A token of another rank (slot -1) is at most kept.
    """
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + t).to(tl.int64)
        # Ends of what is stored and kept: all of it, or nothing. (`mask & condition` of a block and
        # a scalar gives integers in Triton 3.9's interpreter.)
        own, keep = tl.where(slot >= 0, 1, 0), tl.where(t >= keep_from, 1, 0)
        row, kept = kv_ptr + t * stride_kv, kept_ptr + (t - keep_from) * (C + R)
        dtype = kv_ptr.dtype.element_ty

        BLOCK: tl.constexpr = C_PAD if C_PAD < 128 else 128
        BLOCKS: tl.constexpr = C_PAD // BLOCK
        block = tl.arange(0, BLOCKS)
        c = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        is_c = c < C
        x = tl.load(row + c, mask=is_c, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(x * x, 1), 0) / C
        weight = tl.load(weight_ptr + c, mask=is_c, other=0.0)
        x = (x * tl.rsqrt(mean + eps) * weight).to(dtype).to(tl.float32)
        if PACKED:
            code, scale = quantize_block(x, False, NATIVE)
            if NATIVE:
                x = code.to(tl.float32) * scale[:, None]
                code = code.to(tl.uint8, bitcast=True)
            else:
                x = decode_e4m3(code) * scale[:, None]
            tl.store(latent_ptr + slot * stride_latent + c, code, mask=c < C * own)
            is_block = block * BLOCK < C * own
            tl.store(scale_ptr + slot * stride_scale + block, scale, mask=is_block)
        else:
            stored = x.to(latent_ptr.dtype.element_ty)
            tl.store(latent_ptr + slot * stride_latent + c, stored, mask=c < C * own)
            x = stored.to(tl.float32)
        tl.store(kept + c, x.to(dtype), mask=c < C * keep)

        r = tl.arange(0, HALF_PAD)
        is_r = r < R // 2
        first = 2 * r if INTERLEAVED else r
        second = 2 * r + 1 if INTERLEAVED else r + R // 2
        cos = tl.load(cos_ptr + t * (R // 2) + r, mask=is_r, other=0.0)
        sin = tl.load(sin_ptr + t * (R // 2) + r, mask=is_r, other=0.0)
        a = tl.load(row + C + first, mask=is_r, other=0.0).to(tl.float32)
        b = tl.load(row + C + second, mask=is_r, other=0.0).to(tl.float32)
        rope = rope_ptr + slot * stride_rope
        turned_a = (a * cos - b * sin).to(dtype).to(rope_ptr.dtype.element_ty)
        turned_b = (a * sin + b * cos).to(dtype).to(rope_ptr.dtype.element_ty)
        tl.store(rope + first, turned_a, mask=r < R // 2 * own)
        tl.store(rope + second, turned_b, mask=r < R // 2 * own)
        tl.store(kept + C + first, turned_a.to(dtype), mask=r < R // 2 * keep)
        tl.store(kept + C + second, turned_b.to(dtype), mask=r < R // 2 * keep)
    elif B > 0:
        # The compiler wants names of its own for what has another shape in the other branch.
        col = tl.arange(0, B)[:, None] * 128 + tl.arange(0, 128)[None, :]
        query = tl.load(x_ptr + t * stride_x + col, mask=col < A, other=0.0).to(tl.float32)
        scales = tl.load(x_weight_ptr + col, mask=col < A, other=0.0)
        norm_row(query, scales, h_ptr, q_ptr, q_scale_ptr, t, A, eps, B, QUANT, UE8M0, NATIVE)


def launch_entries(
    kv_TX: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    interleaved: bool,
    cache_SX: Tensor,
    slot_T: Tensor,
    keep_from: int,
    norm: tuple[Any, ...] | None = None,
) -> Tensor:
    """Launch a program per token, or two: `norm` is what the kernel takes from `x_ptr` on."""
    (T, X), C = kv_TX.shape, len(weight_C)
    assert kv_TX.stride(1) == cache_SX.stride(1) == 1, f"{kv_TX.stride()=} {cache_SX.stride()=}"
    assert cos_Tr.is_contiguous() and sin_Tr.is_contiguous(), f"{cos_Tr.stride()=}"
    is_packed = cache_SX.dtype == torch.uint8
    scale_Sc, rope_SR = cache_SX, cache_SX[:, C:]
    if is_packed:
        blocks = 4 * -(-C // BLOCK)
        scale_Sc = cache_SX[:, C : C + blocks].view(torch.float32)
        rope_SR = cache_SX[:, C + blocks :].view(torch.bfloat16)
    kept = kv_TX.new_empty(max(0, T - keep_from), X)
    nothing = *5 * [kept], 0, 0, 0, False, False
    if T:
        _rope_and_cache_kernel[(T, 1 if norm is None else 2)](
            *(kv_TX, weight_C, cos_Tr, sin_Tr, slot_T, cache_SX, scale_Sc, rope_SR, kept),
            *(t.stride(0) for t in (kv_TX, cache_SX, scale_Sc, rope_SR)),
            *(keep_from, eps, C, X - C),
            triton.next_power_of_2(C),
            triton.next_power_of_2((X - C) // 2),
            *(interleaved, is_packed, is_native(cache_SX)),
            *(norm or nothing),
            num_warps=_WARPS,
            **launch_options(),
        )
    return kept


def rope_and_cache_triton(*into: *ToCache) -> Tensor:
    """Launch `rope_and_cache`."""
    return launch_entries(*into)


def rope_and_cache(
    kv_TX: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    interleaved: bool,
    cache_SX: Tensor,
    slot_T: Tensor,
    keep_from: int,
) -> Tensor:
    """Normalize latents, rotate keys, store both in their slots, rounded to the cache's format.

    Args:
        kv_TX: [T, C + R] as projected; rows may be strided.
        weight_C: [C] float32, of the latent's RMSNorm.
        eps: of the same.
        cos_Tr: [T, R / 2] float32.
        sin_Tr: [T, R / 2] float32.
        interleaved: how the rotary pairs lie, see `apply_rope`.
        cache_SX: [slots, C + R] or, packed FP8, [slots, packed_bytes] uint8; written in place.
        slot_T: [T] int64; -1 stores nothing.
        keep_from: first row whose entry is wanted back; T for none.

    Returns:
        [T - keep_from, C + R] the entries of these rows as the cache will return them, in the
        dtype of `kv_TX`.
    """
    op = rope_and_cache_triton if use_triton(kv_TX) else rope_and_cache_ref
    return op(kv_TX, weight_C, eps, cos_Tr, sin_Tr, interleaved, cache_SX, slot_T, keep_from)
