"""Both ways on from a projection: the query's latent is normalized, the other goes to the cache.

`add_rmsnorm` without an addition, and `rope_and_cache`, in one launch: neither waits for the other,
and for few tokens either alone is no longer than a launch takes. Bound by latency for few tokens,
by bytes for many.
"""

import torch
from torch import Tensor

from dsv3_kernels._e4m3 import e4m3_view
from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.act_quant import BLOCK, Quantized
from dsv3_kernels.rmsnorm import add_rmsnorm_ref, norm_row
from dsv3_kernels.rope_and_cache import (
    WARPS,
    ToCache,
    cache_entry,
    entry_operands,
    rope_and_cache_ref,
)


def norm_and_cache_ref(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, into: ToCache
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Define `norm_and_cache`: one after the other."""
    _, h_TA, quantized = add_rmsnorm_ref(x_TA, None, weight_A, into[2], quant, ue8m0)
    return h_TA, quantized, rope_and_cache_ref(*into)


@triton.jit(do_not_specialize=["keep_from"])
def _norm_and_cache_kernel(
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
):
    """Two programs for a token: one normalizes x, held as B blocks of 128, one makes the entry."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        col = tl.arange(0, B)[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(x_ptr + t * stride_x + col, mask=col < A, other=0.0).to(tl.float32)
        weight = tl.load(x_weight_ptr + col, mask=col < A, other=0.0)
        norm_row(x, weight, h_ptr, q_ptr, q_scale_ptr, t, A, eps, B, QUANT, UE8M0, NATIVE)
    else:
        # fmt: off
        cache_entry(
            t, kv_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, latent_ptr, scale_ptr, rope_ptr,
            kept_ptr, stride_kv, stride_latent, stride_scale, stride_rope, keep_from, eps,
            C, R, C_PAD, HALF_PAD, INTERLEAVED, PACKED, NATIVE,
        )
        # fmt: on


def norm_and_cache_triton(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, into: ToCache
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Launch two programs per token."""
    T, A = x_TA.shape
    assert x_TA.stride(1) == 1 and len(into[0]) == T, f"{x_TA.stride()=} {into[0].shape=}"
    assert not quant or A % BLOCK == 0, f"{x_TA.shape=}"
    operands, kept = entry_operands(*into)
    h_TA = torch.empty((T, A), dtype=x_TA.dtype, device=x_TA.device)
    out = Quantized.empty(x_TA.shape, x_TA.device) if quant else None
    if T:
        _norm_and_cache_kernel[(T, 2)](
            x_TA,
            weight_A,
            h_TA,
            h_TA if out is None else e4m3_view(out.q),
            h_TA if out is None else out.scale,
            x_TA.stride(0),
            A,
            triton.next_power_of_2(triton.cdiv(A, BLOCK)),
            quant,
            ue8m0,
            *operands,
            # Those of both launches alone, for V3's 1536 and 512 values.
            num_warps=WARPS,
            **launch_options(),
        )
    return h_TA, out, kept


def norm_and_cache(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, into: ToCache
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Do `add_rmsnorm` (without an addition) and `rope_and_cache`.

    Args:
        x_TA: [T, A], any float dtype; rows may be strided.
        weight_A: [A] float32.
        quant: also return the norm of x in FP8; then A is a multiple of 128.
        ue8m0: with scales that are powers of two.
        into: the arguments of `rope_and_cache`, of as many rows; their eps is that of both norms.

    Returns:
        rmsnorm(x), act_quant of that or None, and what `rope_and_cache` returns.
    """
    op = norm_and_cache_triton if use_triton(x_TA) else norm_and_cache_ref
    return op(x_TA, weight_A, quant, ue8m0, into)
