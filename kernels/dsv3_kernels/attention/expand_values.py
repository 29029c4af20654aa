"""Values of absorbed attention: partial outputs merged, then multiplied by W_UV.

    z[t, h] = sum_p exp(lse_p - lse) z_p[t, h]         o[t, h] = W_UV,h z[t, h]

In V3 a head's values are whole blocks of 128, so the same program quantizes them for an output
projection in FP8. Bound by reading W_UV (2 MB for 16 of V3's heads) and the partial outputs, and by
latency: one launch instead of up to four.
"""

import torch
from torch import Tensor

from dsv3_kernels._cast import as_dtype, as_float32
from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, is_hopper, is_interpreted, launch_options, tl, triton
from dsv3_kernels.attention.merge_lse import merge_values
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import Quantized, act_quant, quantize_block
from dsv3_kernels.operation import operation

# Tokens per program; constant, so a token's result does not depend on the number of tokens.
_TOKENS = 16


@triton.jit(do_not_specialize=["T"])
def _expand_values_kernel(
    z_ptr,
    lse_ptr,
    w_ptr,
    o_ptr,
    q_ptr,
    scale_ptr,
    T,
    z_stride_p,
    z_stride_t,
    z_stride_h,
    lse_stride_p,
    lse_stride_t,
    lse_stride_h,
    w_stride_h,
    w_stride_v,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    V_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    MERGE: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute BT tokens of a head."""
    in_turn()
    h = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = t.to(tl.int64)
    is_t = t < T
    v = tl.arange(0, V_PAD)
    c = tl.arange(0, BC)
    z_stride_p = tl.cast(z_stride_p, tl.int64)
    lse_stride_p = tl.cast(lse_stride_p, tl.int64)
    lse_row = lse_ptr + row * lse_stride_t + h * lse_stride_h
    shift = tl.zeros((BT,), tl.float32)
    total = tl.zeros((BT,), tl.float32) + 1.0
    if MERGE:
        best = tl.full((BT,), float("-inf"), tl.float32)
        for p in tl.static_range(PARTS):
            lse = tl.load(lse_row + p * lse_stride_p, mask=is_t, other=float("-inf"))
            best = tl.maximum(best, lse)
        shift = tl.where(best == float("-inf"), 0.0, best)
        total = tl.zeros((BT,), tl.float32)
        for p in tl.static_range(PARTS):
            lse = tl.load(lse_row + p * lse_stride_p, mask=is_t, other=float("-inf"))
            total += tl.exp(lse - shift)
        total = tl.where(total == 0.0, 1.0, total)
    z_row = z_ptr + (row * z_stride_t + h * z_stride_h)[:, None]
    w_row = w_ptr + h * w_stride_h + v[:, None] * w_stride_v
    acc = tl.zeros((BT, V_PAD), tl.float32)
    for first in range(0, C, BC):
        col = first + c
        is_z = is_t[:, None] & (col < C)[None, :]
        w = tl.load(w_row + col[None, :], mask=(v < V)[:, None] & (col < C)[None, :], other=0.0)
        z = tl.zeros((BT, BC), tl.float32)
        for p in tl.static_range(PARTS):
            part_at = z_row + p * z_stride_p + col[None, :]
            part = tl.load(part_at, mask=is_z, other=0.0).to(tl.float32)
            if MERGE:
                lse = tl.load(lse_row + p * lse_stride_p, mask=is_t, other=float("-inf"))
                part *= tl.exp(lse - shift)[:, None]
            z += part
        z = (z / total[:, None]).to(w_ptr.dtype.element_ty).to(DTYPE)
        acc += tl.dot(z, tl.trans(w.to(DTYPE)), input_precision="ieee")
    o = acc.to(o_ptr.dtype.element_ty)
    at = (row * H + h)[:, None] * V + v[None, :]
    tl.store(o_ptr + at, o, mask=is_t[:, None] & (v < V)[None, :])
    if QUANT:
        BLOCKS: tl.constexpr = V // 128
        q, scale = quantize_block(tl.reshape(o.to(tl.float32), (BT * BLOCKS, 128)), UE8M0, NATIVE)
        tl.store(q_ptr + at, tl.reshape(q, (BT, V)), mask=is_t[:, None])
        scale_at = ((row * H + h) * BLOCKS)[:, None] + tl.arange(0, BLOCKS)[None, :]
        tl.store(scale_ptr + scale_at, tl.reshape(scale, (BT, BLOCKS)), mask=is_t[:, None])


def can_quantize(values: int) -> bool:
    """Return True if one program can quantize a head's values: a power of two, whole blocks."""
    return values % BLOCK == 0 and values & (values - 1) == 0


def _launch_expand_values(
    z_PTHC: Tensor,
    lse_PTH: Tensor | None,
    w_uv_HVC: Tensor,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Quantized | None]:
    """Launch a program per head and block of tokens; quantize by a second launch if it cannot."""
    P, T, H, C = z_PTHC.shape
    V = w_uv_HVC.shape[1]
    assert z_PTHC.stride(3) == w_uv_HVC.stride(2) == 1, f"{z_PTHC.stride()=} {w_uv_HVC.stride()=}"
    assert P == 1 or lse_PTH is not None, f"{z_PTHC.shape=}"
    o_TF = torch.empty((T, H * V), dtype=w_uv_HVC.dtype, device=z_PTHC.device)
    is_fused = quant and can_quantize(V)
    out = Quantized.empty(o_TF.shape, o_TF.device) if is_fused else None
    is_exact = w_uv_HVC.dtype == torch.float32 or is_interpreted(z_PTHC)
    lse = z_PTHC[..., 0] if lse_PTH is None else lse_PTH
    if T:
        _expand_values_kernel[(H, cdiv(T, _TOKENS))](
            z_ptr=z_PTHC,
            lse_ptr=lse,
            w_ptr=w_uv_HVC,
            o_ptr=o_TF,
            q_ptr=o_TF if out is None else e4m3_view(out.q),
            scale_ptr=o_TF if out is None else out.scale,
            T=T,
            z_stride_p=z_PTHC.stride(0),
            z_stride_t=z_PTHC.stride(1),
            z_stride_h=z_PTHC.stride(2),
            lse_stride_p=lse.stride(0),
            lse_stride_t=lse.stride(1),
            lse_stride_h=lse.stride(2),
            w_stride_h=w_uv_HVC.stride(0),
            w_stride_v=w_uv_HVC.stride(1),
            H=H,
            V=V,
            C=C,
            V_PAD=max(16, next_power_of_2(V)),
            PARTS=P,
            MERGE=lse_PTH is not None,
            QUANT=is_fused,
            UE8M0=ue8m0,
            NATIVE=is_native(o_TF),
            BT=_TOKENS,
            BC=32 if is_exact else 128,
            DTYPE=tl.float32 if is_exact else tl.bfloat16,
            num_warps=8,
            # Eight ranks' parts in three stages take the shared memory that Hopper has.
            num_stages=3 if is_hopper(z_PTHC) else 2,
            **launch_options(),
        )
    if quant and not is_fused:
        return o_TF, act_quant.kernel(o_TF, ue8m0)
    return o_TF, out


@operation(kernel=_launch_expand_values)
def expand_values(
    z_PTHC: Tensor,
    lse_PTH: Tensor | None,
    w_uv_HVC: Tensor,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Quantized | None]:
    """Merge partial outputs of absorbed attention and expand them to the heads' values.

    Args:
        z_PTHC: [P, T, H, C] over P disjoint sets of keys, any float dtype and strides but the last.
        lse_PTH: [P, T, H] float32 log-sum-exp of the scores, -inf without keys; None if P = 1.
        w_uv_HVC: [H, V, C], any strides but the last; its dtype is the result's.
        quant: also return the result in FP8; H * V must be a multiple of 128.
        ue8m0: round the FP8 scales up to powers of two.

    Returns:
        o_TF: [T, H * V].
        its `act_quant`, or None.

    Source: DeepSeek-V2 paper, section 2.1 and appendix C; merging as in `merge_lse`.
    """
    z_THC = z_PTHC[0] if lse_PTH is None else merge_values(as_float32(z_PTHC), lse_PTH)
    z_HTC = as_dtype(z_THC, w_uv_HVC.dtype).transpose(0, 1)
    o_TF = torch.bmm(z_HTC, w_uv_HVC.transpose(1, 2)).transpose(0, 1).flatten(1)
    return o_TF, act_quant.reference(o_TF, ue8m0) if quant else None
