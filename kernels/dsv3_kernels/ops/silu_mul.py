"""The gated activation between the two projections of an MLP; also straight to FP8.

Bound by bytes: two values are read for each that is written.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import BLOCK, Quantized, act_quant_ref, quantize_block

# Blocks of 128 that a program takes.
_BLOCKS = 8


def silu_mul_ref(gate_up_TF: Tensor) -> Tensor:
    """Define `silu_mul`."""
    gate, up = gate_up_TF.chunk(2, -1)
    return (F.silu(gate.float()) * up.float()).to(gate_up_TF.dtype)


def silu_mul_quant_ref(gate_up_TF: Tensor, ue8m0: bool = False) -> Quantized:
    """Define `silu_mul_quant`: the product is rounded to the activations' dtype in between."""
    return act_quant_ref(silu_mul_ref(gate_up_TF), ue8m0)


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


def _launch(gate_up_TF: Tensor, out: Tensor | Quantized, ue8m0: bool) -> None:
    assert gate_up_TF.is_contiguous() and gate_up_TF.shape[-1] % 2 == 0, f"{gate_up_TF.shape=}"
    width = gate_up_TF.shape[-1] // 2
    if not gate_up_TF.numel():
        return
    grid = (gate_up_TF.numel() // (2 * width), triton.cdiv(width, _BLOCKS * BLOCK))
    quant = isinstance(out, Quantized)
    y, q, scale = (out.q, out.q, out.scale) if isinstance(out, Quantized) else (out, out, out)
    _silu_mul_kernel[grid](
        gate_up_TF,
        e4m3_view(y) if quant else y,
        e4m3_view(q) if quant else q,
        scale,
        width,
        B=_BLOCKS,
        QUANT=quant,
        UE8M0=ue8m0,
        NATIVE=is_native(gate_up_TF),
        num_warps=4,
        **launch_options(),
    )


def silu_mul_triton(gate_up_TF: Tensor) -> Tensor:
    """Launch `silu_mul`."""
    shape = (*gate_up_TF.shape[:-1], gate_up_TF.shape[-1] // 2)
    out = torch.empty(shape, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    _launch(gate_up_TF, out, False)
    return out


def silu_mul_quant_triton(gate_up_TF: Tensor, ue8m0: bool = False) -> Quantized:
    """Launch `silu_mul_quant`."""
    shape = (*gate_up_TF.shape[:-1], gate_up_TF.shape[-1] // 2)
    assert shape[-1] % BLOCK == 0, f"{gate_up_TF.shape=}"
    out = Quantized.empty(shape, gate_up_TF.device)
    _launch(gate_up_TF, out, ue8m0)
    return out


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up, computed in float32.

    Args:
        gate_up_TF: [..., 2F], contiguous, the gate projection in the first half, the up projection
            after it.

    Returns:
        [..., F], same dtype.
    """
    return silu_mul_triton(gate_up_TF) if use_triton(gate_up_TF) else silu_mul_ref(gate_up_TF)


def silu_mul_quant(gate_up_TF: Tensor, ue8m0: bool = False) -> Quantized:
    """Return `act_quant` of `silu_mul`; F is a multiple of 128."""
    op = silu_mul_quant_triton if use_triton(gate_up_TF) else silu_mul_quant_ref
    return op(gate_up_TF, ue8m0)
