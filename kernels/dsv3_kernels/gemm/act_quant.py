"""Activations to FP8, with a scale for every 128 values of a token. Bound by bytes.

All fused kernels that quantize (`add_rmsnorm`, `silu_mul_quant`, the experts) share
`quantize_block`, so fused and separate quantization give the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK, FP8, quantize
from dsv3_kernels.gemm._e4m3 import e4m3_floats, e4m3_view, encode_e4m3, is_native
from dsv3_kernels.operation import operation

# Blocks per program.
_BLOCKS = 8


class Quantized(NamedTuple):
    """Activations in FP8, or in int8 (`int8_quant`): x is about q * scale.

    Attributes:
        q: [..., D] float8_e4m3fn or int8.
        scale: [..., D / 128] float32; of int8, [..., 1].
    """

    q: Tensor
    scale: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.q.device

    @classmethod
    def empty(cls, shape: torch.Size | tuple[int, ...], device: torch.device) -> "Quantized":
        """Return uninitialized memory for FP8 activations of this shape."""
        blocks = (*shape[:-1], shape[-1] // BLOCK)
        return cls(
            torch.empty(shape, dtype=FP8, device=device),
            torch.empty(blocks, dtype=torch.float32, device=device),
        )


@triton.jit
def quantize_block(x, UE8M0: tl.constexpr, NATIVE: tl.constexpr):
    """Do `fp8_format.quantize` for `x` [R, 128]: return e4m3 (see `encode_e4m3`), scales [R]."""
    amax = tl.maximum(tl.max(tl.abs(x), 1), 1e-4)
    scale = tl.div_rn(amax, 448.0)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    by_value = tl.broadcast_to(scale[:, None], x.shape)
    return encode_e4m3(tl.div_rn(x, by_value), NATIVE), scale


@triton.jit(do_not_specialize=["blocks", "start_ptr", "count_ptr", "width"])
def _act_quant_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    blocks,
    start_ptr,
    count_ptr,
    width,
    R: tl.constexpr,
    LIMITED: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Quantize R blocks of 128, counted over all rows of `width` blocks.

    If LIMITED, only the rows before start + count, two numbers on the device.
    """
    in_turn()
    if LIMITED:
        blocks = (tl.load(start_ptr) + tl.load(count_ptr)).to(tl.int64) * width
    first = tl.program_id(0).to(tl.int64) * R
    if first < blocks:
        rows = first + tl.arange(0, R)
        at = rows[:, None] * 128 + tl.arange(0, 128)[None, :]
        mask = (rows < blocks)[:, None]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        q, scale = quantize_block(x, UE8M0, NATIVE)
        tl.store(q_ptr + at, q, mask=mask)
        tl.store(scale_ptr + rows, scale, mask=rows < blocks)


def launch_act_quant(
    x_TD: Tensor, ue8m0: bool, start_E: Tensor | None = None, count_E: Tensor | None = None
) -> Quantized:
    """Launch `act_quant`, of sorted rows for those of E groups only; others stay undefined.

    Args:
        x_TD: see `act_quant`.
        ue8m0: see `act_quant`.
        start_E: [E] int32 first row of each group, ascending; None for all rows.
        count_E: [E] int32 rows of each group.
    """
    assert x_TD.shape[-1] % BLOCK == 0, f"{x_TD.shape=}"
    x_TD = x_TD.contiguous()
    out = Quantized.empty(x_TD.shape, x_TD.device)
    blocks = out.scale.numel()
    if blocks:
        _act_quant_kernel[(cdiv(blocks, _BLOCKS),)](
            x_ptr=x_TD,
            q_ptr=e4m3_view(out.q),
            scale_ptr=out.scale,
            blocks=blocks,
            start_ptr=out.scale if start_E is None else start_E[-1:],
            count_ptr=out.scale if count_E is None else count_E[-1:],
            width=out.scale.shape[-1],
            R=_BLOCKS,
            LIMITED=start_E is not None,
            UE8M0=ue8m0,
            NATIVE=is_native(x_TD),
            num_warps=2,
            **launch_options(),
        )
    return out


def _launch_act_quant(x_TD: Tensor, ue8m0: bool = False) -> Quantized:
    return launch_act_quant(x_TD, ue8m0)


@operation(kernel=_launch_act_quant)
def act_quant(x_TD: Tensor, ue8m0: bool = False) -> Quantized:
    """Quantize activations to FP8 in blocks of 128 along the last dimension.

    scale = max|x| / 448 per block, at least 1e-4 / 448; q = x / scale.

    Args:
        x_TD: [..., D], any float dtype, D a multiple of 128.
        ue8m0: round scales up to powers of two.

    Source: DeepSeek-V3 report, section 3.3.2.
    """
    q, scale = quantize(x_TD.float().unflatten(-1, (-1, BLOCK)), ue8m0)
    return Quantized(q.flatten(-2), scale)


def dequantize(x: Tensor | Quantized) -> Tensor:
    """Return q * scale in float32; a tensor is returned unchanged."""
    if isinstance(x, Tensor):
        return x
    q = e4m3_floats(x.q) if x.q.dtype == FP8 else x.q.float()
    blocks = q.unflatten(-1, (x.scale.shape[-1], -1))
    return (blocks * x.scale.unsqueeze(-1)).flatten(-2)
