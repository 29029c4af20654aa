"""Attention results on their way out of latent space: partial ones merged, then W_UV.

    z[t, h] = sum_p exp(lse_p - lse) z_p[t, h]         o[t, h] = W_UV,h z[t, h]

A head's values are whole blocks of 128 in V3, so the same program quantizes them for an output
projection in FP8. Bound by reading W_UV (2 MB for 16 of V3's heads) and the parts, and by latency:
up to four launches are one.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton, use_triton
from dsv3_kernels.attention.merge_lse import merge_lse_ref
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import (
    BLOCK,
    Quantized,
    act_quant,
    act_quant_ref,
    quantize_block,
)

# Tokens of a program, always: a token's result does not depend on how many there are.
_TOKENS = 16


def expand_values_ref(
    z_PTHC: Tensor,
    lse_PTH: Tensor | None,
    w_uv_HVC: Tensor,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Quantized | None]:
    """Define `expand_values`."""
    z_THC = z_PTHC[0] if lse_PTH is None else merge_lse_ref(z_PTHC.float(), lse_PTH)[0]
    z_HTC = z_THC.to(w_uv_HVC.dtype).transpose(0, 1)
    o_TF = torch.bmm(z_HTC, w_uv_HVC.transpose(1, 2)).transpose(0, 1).flatten(1)
    return o_TF, act_quant_ref(o_TF, ue8m0) if quant else None


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
    """One program: BT tokens of a head."""
    in_turn()
    h = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row, is_t = t.to(tl.int64), t < T
    v, c = tl.arange(0, V_PAD), tl.arange(0, BC)
    lse_row = lse_ptr + row * lse_stride_t + h * lse_stride_h
    shift, total = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32) + 1.0
    if MERGE:
        best = tl.full((BT,), float("-inf"), tl.float32)
        for p in tl.static_range(PARTS):
            lse = tl.load(lse_row + p * lse_stride_p, mask=is_t, other=float("-inf"))
            best = tl.maximum(best, lse)
        shift, total = tl.where(best == float("-inf"), 0.0, best), tl.zeros((BT,), tl.float32)
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
    """Tell whether a head's values are blocks that one program can quantize."""
    return values % BLOCK == 0 and values & (values - 1) == 0


def expand_values_triton(
    z_PTHC: Tensor,
    lse_PTH: Tensor | None,
    w_uv_HVC: Tensor,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Quantized | None]:
    """Launch a program per head and some tokens."""
    (P, T, H, C), V = z_PTHC.shape, w_uv_HVC.shape[1]
    assert z_PTHC.stride(3) == w_uv_HVC.stride(2) == 1, f"{z_PTHC.stride()=} {w_uv_HVC.stride()=}"
    assert P == 1 or lse_PTH is not None, f"{z_PTHC.shape=}"
    assert can_quantize(V) or not quant, f"{V=}"
    o_TF = torch.empty((T, H * V), dtype=w_uv_HVC.dtype, device=z_PTHC.device)
    out = Quantized.empty(o_TF.shape, o_TF.device) if quant else None
    is_exact = w_uv_HVC.dtype == torch.float32 or is_interpreted(z_PTHC)
    merges = lse_PTH is not None
    lse = z_PTHC[..., 0] if lse_PTH is None else lse_PTH
    if T:
        _expand_values_kernel[(H, triton.cdiv(T, _TOKENS))](
            *(z_PTHC, lse, w_uv_HVC, o_TF),
            *((o_TF, o_TF) if out is None else (e4m3_view(out.q), out.scale)),
            *(T, *z_PTHC.stride()[:3], *lse.stride(), *w_uv_HVC.stride()[:2]),
            *(H, V, C, max(16, triton.next_power_of_2(V)), P, merges, quant, ue8m0),
            *(is_native(o_TF), _TOKENS, 32 if is_exact else 128),
            tl.float32 if is_exact else tl.bfloat16,
            num_warps=8,
            num_stages=3,
            **launch_options(),
        )
    return o_TF, out


def expand_values(
    z_PTHC: Tensor,
    lse_PTH: Tensor | None,
    w_uv_HVC: Tensor,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Quantized | None]:
    """Merge partial results of absorbed attention, expand them to the heads' values.

    Args:
        z_PTHC: [P, T, H, C] of P disjoint sets of keys, any float dtype and strides but the last.
        lse_PTH: [P, T, H] float32 log-sum-exp of their scores, -inf for no key; None if P = 1.
        w_uv_HVC: [H, V, C], any strides but the last; its dtype is the result's.
        quant: also return the result in FP8; then H * V is a multiple of 128.
        ue8m0: with scales that are powers of two.

    Returns:
        o_TF: [T, H * V].
        its `act_quant`, or None.

    Source: DeepSeek-V2 paper, section 2.1 and appendix C; merging as in `merge_lse`.
    """
    args = z_PTHC, lse_PTH, w_uv_HVC
    if not use_triton(z_PTHC):
        return expand_values_ref(*args, quant, ue8m0)
    if can_quantize(w_uv_HVC.shape[1]) or not quant:
        return expand_values_triton(*args, quant, ue8m0)
    o_TF, _ = expand_values_triton(*args)
    return o_TF, act_quant(o_TF, ue8m0)
