"""The gated activation between the two projections of an MLP, in float or FP8.

Bound by bytes: two values are read for each value written.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._cast import as_dtype, as_float32
from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import Quantized, act_quant, quantize_block
from dsv3_kernels.operation import operation

# Blocks of 128 values per program.
_BLOCKS = 8


@triton.jit
def _silu_mul_kernel(
    x_ptr,
    y_ptr,
    q_ptr,
    scale_ptr,
    width,
    B: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Take B blocks of 128 of one row; write them to `y_ptr`, or quantized (QUANT)."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * B + tl.arange(0, B)
    col = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = col < width
    gate = tl.load(x_ptr + row * (2 * width) + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * width) + width + col, mask=mask, other=0.0).to(tl.float32)
    y = (gate / (1.0 + tl.exp(-gate)) * up).to(x_ptr.dtype.element_ty)
    if QUANT:
        q, scale = quantize_block(y.to(tl.float32), UE8M0, NATIVE)
        tl.store(q_ptr + row * width + col, q, mask=mask)
        tl.store(scale_ptr + row * (width // 128) + block, scale, mask=block < width // 128)
    else:
        tl.store(y_ptr + row * width + col, y, mask=mask)


def _launch(gate_up_TF: Tensor, y_TF: Tensor | None, out: Quantized | None, ue8m0: bool) -> None:
    """Launch the kernel; the result goes to `y_TF`, or quantized to `out`."""
    assert gate_up_TF.is_contiguous() and gate_up_TF.shape[-1] % 2 == 0, f"{gate_up_TF.shape=}"
    width = gate_up_TF.shape[-1] // 2
    if not gate_up_TF.numel():
        return
    grid = (gate_up_TF.numel() // (2 * width), cdiv(width, _BLOCKS * BLOCK))
    _silu_mul_kernel[grid](
        x_ptr=gate_up_TF,
        y_ptr=gate_up_TF if y_TF is None else y_TF,
        q_ptr=gate_up_TF if out is None else e4m3_view(out.q),
        scale_ptr=gate_up_TF if out is None else out.scale,
        width=width,
        B=_BLOCKS,
        QUANT=out is not None,
        UE8M0=ue8m0,
        NATIVE=is_native(gate_up_TF),
        num_warps=4,
        **launch_options(),
    )


def _launch_silu_mul(gate_up_TF: Tensor) -> Tensor:
    shape = (*gate_up_TF.shape[:-1], gate_up_TF.shape[-1] // 2)
    y_TF = torch.empty(shape, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    _launch(gate_up_TF, y_TF, None, False)
    return y_TF


def _launch_silu_mul_quant(gate_up_TF: Tensor, ue8m0: bool = False) -> Quantized:
    shape = (*gate_up_TF.shape[:-1], gate_up_TF.shape[-1] // 2)
    assert shape[-1] % BLOCK == 0, f"{gate_up_TF.shape=}"
    out = Quantized.empty(shape, gate_up_TF.device)
    _launch(gate_up_TF, None, out, ue8m0)
    return out


@operation(kernel=_launch_silu_mul)
def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up, computed in float32 and rounded once.

    Args:
        gate_up_TF: [..., 2F], contiguous; the gate projection in the first half, the up projection
            in the second.

    Returns:
        [..., F], same dtype.
    """
    gate, up = gate_up_TF.chunk(2, -1)
    return as_dtype(F.silu(as_float32(gate)).mul_(up), gate_up_TF.dtype)


@operation(kernel=_launch_silu_mul_quant)
def silu_mul_quant(gate_up_TF: Tensor, ue8m0: bool = False) -> Quantized:
    """Return `act_quant` of `silu_mul`; F must be a multiple of 128.

    The product is rounded to the dtype of `gate_up_TF` before it is quantized.
    """
    return act_quant.reference(silu_mul.reference(gate_up_TF), ue8m0)
