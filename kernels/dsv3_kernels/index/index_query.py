"""Index queries and the weights of their heads, as `index_scores` takes them. Bound by latency."""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention.rope import Rotation, apply_rope
from dsv3_kernels.fp8_format import FP8
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import quantize_block
from dsv3_kernels.index._index_rows import hadamard_rows, partner_of, turn_rows
from dsv3_kernels.index.index_cache import quantize_index, stages_of
from dsv3_kernels.operation import operation

_HEADS = 16  # per program


@triton.jit(do_not_specialize=["part_ptr", "stride_part"])
def _index_query_kernel(
    q_ptr,
    part_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    weight_ptr,
    stride_t,
    stride_h,
    stride_part,
    weight_scale,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IS_FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ROOT: tl.constexpr,
    STAGES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate HEADS heads of a token, and scale their weights."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_h = h < H
    i = tl.arange(0, I)[None, :]
    other = tl.where(i < 2 * HALF, partner_of(i, HALF, INTERLEAVED), i)
    row = q_ptr + t * stride_t + (h * stride_h)[:, None]
    dtype = q_ptr.dtype.element_ty
    x = tl.load(row + i, mask=is_h[:, None], other=0.0).to(tl.float32)
    partner = tl.load(row + other, mask=is_h[:, None], other=0.0).to(tl.float32)
    x = turn_rows(x, partner, i, cos_ptr, sin_ptr, t, HALF, INTERLEAVED).to(dtype)
    weight = tl.zeros((HEADS,), tl.float32)
    for part in range(PARTS):
        weight += tl.load(part_ptr + part * stride_part + t * H + h, mask=is_h, other=0.0)
    weight *= weight_scale
    out_at = out_ptr + (t * H + h)[:, None] * I + i
    if IS_FP8:
        x = hadamard_rows(x.to(tl.float32), ROOT, STAGES).to(dtype).to(tl.float32)
        code, scale = quantize_block(x, True, NATIVE)
        tl.store(out_at, code, mask=is_h[:, None])
        weight *= scale
    else:
        tl.store(out_at, x, mask=is_h[:, None])
    tl.store(weight_ptr + t * H + h, weight, mask=is_h)


def _launch_index_queries(
    q_THI: Tensor, weight_STH: Tensor, rotation: Rotation, is_fp8: bool
) -> tuple[Tensor, Tensor]:
    """Launch a program per token and block of heads."""
    T, H, dim = q_THI.shape
    assert q_THI.stride(2) == 1 and weight_STH[0].is_contiguous(), f"{q_THI.stride()=}"
    rotation.check_contiguous()
    dtype = FP8 if is_fp8 else q_THI.dtype
    out_THI = torch.empty(T, H, dim, dtype=dtype, device=q_THI.device)
    weight_TH = torch.empty(T, H, dtype=torch.float32, device=q_THI.device)
    if T:
        _index_query_kernel[(T, cdiv(H, _HEADS))](
            q_ptr=q_THI,
            part_ptr=weight_STH,
            cos_ptr=rotation.cos_Tr,
            sin_ptr=rotation.sin_Tr,
            out_ptr=e4m3_view(out_THI) if is_fp8 else out_THI,
            weight_ptr=weight_TH,
            stride_t=q_THI.stride(0),
            stride_h=q_THI.stride(1),
            stride_part=weight_STH.stride(0),
            weight_scale=(H * dim) ** -0.5,
            PARTS=len(weight_STH),
            H=H,
            I=dim,
            HALF=rotation.cos_Tr.shape[1],
            INTERLEAVED=rotation.interleaved,
            IS_FP8=is_fp8,
            NATIVE=is_native(q_THI),
            ROOT=dim**-0.5,
            STAGES=stages_of(dim),
            HEADS=_HEADS,
            num_warps=4,
            **launch_options(),
        )
    return out_THI, weight_TH


@operation(kernel=_launch_index_queries)
def index_queries(
    q_THI: Tensor, weight_STH: Tensor, rotation: Rotation, is_fp8: bool
) -> tuple[Tensor, Tensor]:
    """Rotate index queries and scale the weights of their heads.

    Args:
        q_THI: [T, H, I] as projected.
        weight_STH: [S, T, H] float32, in parts that are added in order (see `router_logits`).
        rotation: of the first dimensions of the queries, as many as it has.
        is_fp8: the keys are in FP8, so the queries are rotated by the same Hadamard matrix and
            quantized, with a scale for each head that goes into the head's weight.

    Returns:
        [T, H, I] in the dtype of `q_THI`, or float8_e4m3fn.
        [T, H] float32: weight / sqrt(H I), times the scale.
    """
    H, dim = q_THI.shape[1:]
    split = 2 * rotation.cos_Tr.shape[1]
    q_THI = torch.cat((apply_rope(q_THI[..., :split], rotation), q_THI[..., split:]), -1)
    weight_TH = weight_STH.sum(0) * (H * dim) ** -0.5
    if not is_fp8:
        return q_THI, weight_TH
    quantized, scale_TH = quantize_index(q_THI)
    return quantized, weight_TH * scale_TH
