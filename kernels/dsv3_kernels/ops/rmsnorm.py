"""Root-mean-square normalization, alone or fused with the residual addition and quantization.

`add_rmsnorm` adds to the residual stream, normalizes and optionally quantizes: one launch and one
pass over the data instead of three. Bound by bytes: every value is read and written once. A program
owns a row, so a row's result does not depend on other rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels._cast import as_dtype, as_float32
from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import Quantized, act_quant, quantize_block
from dsv3_kernels.operation import operation


class NormedSum(NamedTuple):
    """The residual stream after an addition, and its norm.

    Attributes:
        total: [..., D] the sum, rounded to the dtype of the residual stream.
        norm: [..., D] the RMS norm of the sum, of the same dtype.
        quantized: `act_quant` of the norm, or None.
    """

    total: Tensor
    norm: Tensor
    quantized: Quantized | None


@triton.jit
def norm_row(
    x,
    weight,
    h_ptr,
    q_ptr,
    scale_ptr,
    row,
    D,
    eps,
    B: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Store the norm of a row of float32, held as B blocks of 128, and its FP8 form if QUANT."""
    block = tl.arange(0, B)
    col = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = col < D
    mean = tl.sum(tl.sum(x * x, 1), 0) / D
    h = (x * tl.rsqrt(mean + eps) * weight).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * D + col, h, mask=mask)
    if QUANT:
        q, scale = quantize_block(h.to(tl.float32), UE8M0, NATIVE)
        tl.store(q_ptr + row * D + col, q, mask=mask)
        tl.store(scale_ptr + row * (D // 128) + block, scale, mask=block < D // 128)


@triton.jit
def _rmsnorm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    sum_ptr,
    h_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    D,
    eps,
    B: tl.constexpr,
    ADD: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Normalize one row, held as B blocks of 128."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, B)[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = col < D
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + row * D + col, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + col, rounded, mask=mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    norm_row(
        x=x,
        weight=weight,
        h_ptr=h_ptr,
        q_ptr=q_ptr,
        scale_ptr=scale_ptr,
        row=row,
        D=D,
        eps=eps,
        B=B,
        QUANT=QUANT,
        UE8M0=UE8M0,
        NATIVE=NATIVE,
    )


def _launch_add_rmsnorm(
    x_TD: Tensor,
    y_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    quant: bool = False,
    ue8m0: bool = False,
) -> NormedSum:
    D = x_TD.shape[-1]
    rows = x_TD.reshape(-1, D)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    assert not quant or D % BLOCK == 0, f"{x_TD.shape=}"
    h_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = x_TD if y_TD is None else torch.empty_like(h_TD)
    out = Quantized.empty(x_TD.shape, x_TD.device) if quant else None
    if len(rows):
        blocks = next_power_of_2(cdiv(D, BLOCK))
        _rmsnorm_kernel[(len(rows),)](
            x_ptr=rows,
            y_ptr=h_TD if y_TD is None else y_TD.contiguous(),
            weight_ptr=weight_D,
            sum_ptr=sum_TD,
            h_ptr=h_TD,
            q_ptr=h_TD if out is None else e4m3_view(out.q),
            scale_ptr=h_TD if out is None else out.scale,
            x_stride=rows.stride(0),
            D=D,
            eps=eps,
            B=blocks,
            ADD=y_TD is not None,
            QUANT=quant,
            UE8M0=ue8m0,
            NATIVE=is_native(x_TD),
            num_warps=min(8, max(1, blocks // 4)),
            **launch_options(),
        )
    return NormedSum(sum_TD, h_TD, out)


def _launch_rmsnorm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _launch_add_rmsnorm(x_TD, None, weight_D, eps).norm


@operation(kernel=_launch_rmsnorm)
def rmsnorm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), computed in float32 and rounded once.

    Args:
        x_TD: [..., D], any float dtype; rows may have any stride.
        weight_D: [D] float32.
        eps: added to the mean square.

    Returns:
        Same shape and dtype as `x_TD`.
    """
    x = as_float32(x_TD)
    square_T1 = torch.linalg.vecdot(x, x).unsqueeze(-1)
    scale_T1 = square_T1.div_(x.shape[-1]).add_(eps).rsqrt_()
    return as_dtype((x * scale_T1).mul_(weight_D), x_TD.dtype)


@operation(kernel=_launch_add_rmsnorm)
def add_rmsnorm(
    x_TD: Tensor,
    y_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    quant: bool = False,
    ue8m0: bool = False,
) -> NormedSum:
    """Add to the residual stream, normalize the rounded sum, and quantize the norm if `quant`.

    Args:
        x_TD: [..., D] residual stream, any float dtype.
        y_TD: [..., D], any float dtype: a layer's output, or None for nothing to add.
        weight_D: [D] float32.
        eps: added to the mean square.
        quant: also return the norm in FP8; D must be a multiple of 128.
        ue8m0: round the FP8 scales up to powers of two.
    """
    # Of mixed dtypes a sum is in the wider one, float32; of bfloat16 it is rounded once.
    sum_TD = x_TD if y_TD is None else as_dtype(x_TD + y_TD, x_TD.dtype)
    h_TD = rmsnorm.reference(sum_TD, weight_D, eps)
    return NormedSum(sum_TD, h_TD, act_quant.reference(h_TD, ue8m0) if quant else None)
