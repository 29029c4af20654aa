"""Root-mean-square normalization, alone or with what stands around it in a decoder layer.

`add_rmsnorm` first adds to the residual stream and may quantize the result for an FP8 product:
one launch and one pass instead of three. Bound by bytes: every value is read and written once.
A program owns a row, so rows do not see each other.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import BLOCK, Quantized, act_quant_ref, quantize_block


def rmsnorm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Define `rmsnorm`: all in float32, rounded once at the end."""
    return torch.rms_norm(x_TD.float(), weight_D.shape, weight_D, eps).to(x_TD.dtype)


def add_rmsnorm_ref(
    x_TD: Tensor,
    y_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Tensor, Quantized | None]:
    """Define `add_rmsnorm`: the sum is rounded before it is normalized, as it will be read."""
    sum_TD = x_TD if y_TD is None else (x_TD.float() + y_TD.float()).to(x_TD.dtype)
    h_TD = rmsnorm_ref(sum_TD, weight_D, eps)
    return sum_TD, h_TD, act_quant_ref(h_TD, ue8m0) if quant else None


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
    """Write the norm of a row of float32, held as B blocks of 128, and what it is in FP8."""
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
    norm_row(x, weight, h_ptr, q_ptr, scale_ptr, row, D, eps, B, QUANT, UE8M0, NATIVE)


def add_rmsnorm_triton(
    x_TD: Tensor,
    y_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Tensor, Quantized | None]:
    """Launch `add_rmsnorm`; also `rmsnorm`, which takes rows with any stride."""
    D = x_TD.shape[-1]
    rows = x_TD.reshape(-1, D)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    assert not quant or D % BLOCK == 0, f"{x_TD.shape=}"
    h_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = x_TD if y_TD is None else torch.empty_like(h_TD)
    out = Quantized.empty(x_TD.shape, x_TD.device) if quant else None
    if len(rows):
        blocks = triton.next_power_of_2(triton.cdiv(D, BLOCK))
        _rmsnorm_kernel[(len(rows),)](
            rows,
            h_TD if y_TD is None else y_TD.contiguous(),
            weight_D,
            sum_TD,
            h_TD,
            h_TD if out is None else e4m3_view(out.q),
            h_TD if out is None else out.scale,
            rows.stride(0),
            D,
            eps,
            B=blocks,
            ADD=y_TD is not None,
            QUANT=quant,
            UE8M0=ue8m0,
            NATIVE=is_native(x_TD),
            num_warps=min(8, max(1, blocks // 4)),
            **launch_options(),
        )
    return sum_TD, h_TD, out


def rmsnorm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps).

    Args:
        x_TD: [..., D], any float dtype.
        weight_D: [D] float32.
        eps: added to the mean square.

    Returns:
        Same shape and dtype as `x_TD`.
    """
    if use_triton(x_TD):
        return add_rmsnorm_triton(x_TD, None, weight_D, eps)[1]
    return rmsnorm_ref(x_TD, weight_D, eps)


def add_rmsnorm(
    x_TD: Tensor,
    y_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    quant: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Tensor, Quantized | None]:
    """Add to the residual stream, normalize it, and quantize that if asked to.

    Args:
        x_TD: [..., D] residual stream, any float dtype.
        y_TD: [..., D], any float dtype: what a layer adds to it, or None.
        weight_D: [D] float32.
        eps: added to the mean square.
        quant: also return the result in FP8; then D is a multiple of 128.
        ue8m0: with scales that are powers of two.

    Returns:
        x + y, rmsnorm(x + y), and act_quant of that or None.
    """
    op = add_rmsnorm_triton if use_triton(x_TD) else add_rmsnorm_ref
    return op(x_TD, y_TD, weight_D, eps, quant, ue8m0)


def rmsnorm_quant(
    x_TD: Tensor, weight_D: Tensor, eps: float, ue8m0: bool = False
) -> tuple[Tensor, Quantized]:
    """Return `rmsnorm` and `act_quant` of it; D is a multiple of 128."""
    _, h_TD, quantized = add_rmsnorm(x_TD, None, weight_D, eps, True, ue8m0)
    assert quantized is not None
    return h_TD, quantized
