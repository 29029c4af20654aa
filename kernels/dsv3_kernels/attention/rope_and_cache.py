"""Cache entries from projected latents: normalize, rotate, round, store. Bound by latency.

Four small operations on 576 values per token; one launch instead of six or more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._cast import as_dtype
from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention.kv_fp8 import pack_latent, packed_views, unpack_latent
from dsv3_kernels.attention.rope import Rotation, apply_rope
from dsv3_kernels.attention.write_slots import StoredRows
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import decode_e4m3, e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import Quantized, quantize_block
from dsv3_kernels.operation import operation
from dsv3_kernels.ops.rmsnorm import norm_row, rmsnorm

# Warps per program: one per block of V3's latent, and enough for V3's 1536 query values.
_WARPS = 4


@dataclass(frozen=True, slots=True)
class EntryWrite:
    """The input of `rope_and_cache`.

    Attributes:
        kv_TX: [T, C + R] as projected; rows may be strided.
        weight_C: [C] float32, weight of the latent's RMSNorm.
        eps: of the same norm.
        rotation: of the keys.
        cache_SX: [slots, C + R] or, packed FP8, [slots, packed_bytes] uint8; written in place.
        slot_T: [T] int64; -1 stores nothing.
        keep_from: first row whose entry is returned; T for none.
        stored: on a CPU, the rows with a slot, computed once for all layers; only the reference
            uses it.
    """

    kv_TX: Tensor
    weight_C: Tensor
    eps: float
    rotation: Rotation
    cache_SX: Tensor
    slot_T: Tensor
    keep_from: int
    stored: StoredRows | None = None

    @property
    def device(self) -> torch.device:
        """Device of the latents."""
        return self.kv_TX.device


@dataclass(frozen=True, slots=True)
class QueryNorm:
    """A norm of query latents in the launch of `rope_and_cache`; its eps is that of the entries.

    Attributes:
        x_TA: [T, A] query latents.
        weight_A: [A] float32.
        h_TA: [T, A] memory for the norm.
        quantized: memory for the norm in FP8, or None.
        ue8m0: round the FP8 scales up to powers of two.
    """

    x_TA: Tensor
    weight_A: Tensor
    h_TA: Tensor
    quantized: Quantized | None
    ue8m0: bool


def latent_entries(kv_TX: Tensor, weight_C: Tensor, eps: float, rotation: Rotation) -> Tensor:
    """Return unrounded cache entries [T, C + R]: normalized latents, rotated keys.

    The arguments are those of `EntryWrite`.
    """
    C = len(weight_C)
    latent_TC = rmsnorm(kv_TX[:, :C], weight_C, eps)
    return torch.cat((latent_TC, apply_rope(kv_TX[:, C:], rotation)), -1)


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
    x_ptr,
    x_weight_ptr,
    h_ptr,
    q_ptr,
    q_scale_ptr,
    stride_kv,
    stride_latent,
    stride_scale,
    stride_rope,
    stride_x,
    keep_from,
    eps,
    A,
    C: tl.constexpr,
    R: tl.constexpr,
    C_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
    B: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """Compute and store a token's entry; if B > 0, a second program normalizes a row of B x 128.

    An entry with slot -1 (of another rank) is not stored.
    """
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + t).to(tl.int64)
        # Factors for the bounds of stores: 1 to store all, 0 for nothing. (`mask & condition` of a
        # block and a scalar gives integers in Triton 3.9's interpreter.)
        own = tl.where(slot >= 0, 1, 0)
        keep = tl.where(t >= keep_from, 1, 0)
        row = kv_ptr + t * stride_kv
        kept = kept_ptr + (t - keep_from) * (C + R)
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
        # The compiler requires different names for values that differ in shape between branches.
        col = tl.arange(0, B)[:, None] * 128 + tl.arange(0, 128)[None, :]
        query = tl.load(x_ptr + t * stride_x + col, mask=col < A, other=0.0).to(tl.float32)
        scales = tl.load(x_weight_ptr + col, mask=col < A, other=0.0)
        norm_row(
            x=query,
            weight=scales,
            h_ptr=h_ptr,
            q_ptr=q_ptr,
            scale_ptr=q_scale_ptr,
            row=t,
            D=A,
            eps=eps,
            B=B,
            QUANT=QUANT,
            UE8M0=UE8M0,
            NATIVE=NATIVE,
        )


def launch_entries(write: EntryWrite, norm: QueryNorm | None) -> Tensor:
    """Launch a program per token, and another per token for `norm`."""
    T, X = write.kv_TX.shape
    C = len(write.weight_C)
    cache_SX = write.cache_SX
    assert write.kv_TX.stride(1) == cache_SX.stride(1) == 1, f"{write.kv_TX.stride()=}"
    write.rotation.check_contiguous()
    is_packed = cache_SX.dtype == torch.uint8
    scale_Sc = cache_SX
    rope_SR = cache_SX[:, C:]
    if is_packed:
        scale_Sc, rope_SR = packed_views(cache_SX, C)
    kept = write.kv_TX.new_empty(max(0, T - write.keep_from), X)
    if norm is None:
        norm = QueryNorm(x_TA=kept, weight_A=kept, h_TA=kept, quantized=None, ue8m0=False)
        norm_blocks = 0
    else:
        norm_blocks = next_power_of_2(cdiv(norm.x_TA.shape[1], BLOCK))
    if T:
        _rope_and_cache_kernel[(T, 2 if norm_blocks else 1)](
            kv_ptr=write.kv_TX,
            weight_ptr=write.weight_C,
            cos_ptr=write.rotation.cos_Tr,
            sin_ptr=write.rotation.sin_Tr,
            slot_ptr=write.slot_T,
            latent_ptr=cache_SX,
            scale_ptr=scale_Sc,
            rope_ptr=rope_SR,
            kept_ptr=kept,
            x_ptr=norm.x_TA,
            x_weight_ptr=norm.weight_A,
            h_ptr=norm.h_TA,
            q_ptr=norm.h_TA if norm.quantized is None else e4m3_view(norm.quantized.q),
            q_scale_ptr=norm.h_TA if norm.quantized is None else norm.quantized.scale,
            stride_kv=write.kv_TX.stride(0),
            stride_latent=cache_SX.stride(0),
            stride_scale=scale_Sc.stride(0),
            stride_rope=rope_SR.stride(0),
            stride_x=norm.x_TA.stride(0) if norm_blocks else 0,
            keep_from=write.keep_from,
            eps=write.eps,
            A=norm.x_TA.shape[1] if norm_blocks else 0,
            C=C,
            R=X - C,
            C_PAD=next_power_of_2(C),
            HALF_PAD=next_power_of_2((X - C) // 2),
            INTERLEAVED=write.rotation.interleaved,
            PACKED=is_packed,
            NATIVE=is_native(cache_SX),
            B=norm_blocks,
            QUANT=norm.quantized is not None,
            UE8M0=norm.ue8m0,
            num_warps=_WARPS,
            **launch_options(),
        )
    return kept


def _launch_rope_and_cache(write: EntryWrite) -> Tensor:
    return launch_entries(write, None)


@operation(kernel=_launch_rope_and_cache)
def rope_and_cache(write: EntryWrite) -> Tensor:
    """Normalize latents, rotate keys, store both in their slots, rounded to the cache's format.

    Returns:
        [T - keep_from, C + R] the last entries as the cache will return them, in the dtype of
        `kv_TX`.
    """
    C = len(write.weight_C)
    dtype = write.kv_TX.dtype
    entry_TX = latent_entries(write.kv_TX, write.weight_C, write.eps, write.rotation)
    rows = write.stored or StoredRows.of(write.slot_T)
    if write.cache_SX.dtype == torch.uint8:
        packed = pack_latent(entry_TX, C)
        rows.copy_to(write.cache_SX, packed)
        return unpack_latent(packed[write.keep_from :], C, dtype)
    stored = as_dtype(entry_TX, write.cache_SX.dtype)
    rows.copy_to(write.cache_SX, stored)
    return as_dtype(stored[write.keep_from :], dtype)
