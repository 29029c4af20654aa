"""Activations to int8, with a scale for every token: for products with matrices of int8.

A program owns a row. Bound by bytes.
"""

import torch
from torch import Tensor

from dsv3_kernels._gpu import next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.gemm.act_quant import Quantized, act_quant
from dsv3_kernels.operation import operation

_MAX = 127.0
_MIN_AMAX = 1e-4


@triton.jit(do_not_specialize=["start_ptr", "count_ptr"])
def _int8_quant_kernel(
    x_ptr, q_ptr, scale_ptr, start_ptr, count_ptr, D, B: tl.constexpr, LIMITED: tl.constexpr
):
    """Quantize a row of D values, held as B; if LIMITED, only rows before start + count."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    stop = row + 1
    if LIMITED:
        stop = (tl.load(start_ptr) + tl.load(count_ptr)).to(tl.int64)
    if row < stop:
        col = tl.arange(0, B)
        x = tl.load(x_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        # A row of zeros gets the scale of a tiny one, not 0 / 0.
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), 1e-4), 127.0)
        # Floats around 1.5 * 2^23 are whole numbers: the sum rounds to the nearest, ties to even.
        shifted = tl.div_rn(x, tl.broadcast_to(scale, x.shape)) + 12582912.0
        q = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(q_ptr + row * D + col, q.to(tl.int8), mask=col < D)
        tl.store(scale_ptr + row, scale)


def launch_int8_quant(
    x_TD: Tensor, start_E: Tensor | None = None, count_E: Tensor | None = None
) -> Quantized:
    """Launch `int8_quant`, of sorted rows for those of E groups only; others stay undefined.

    Args:
        x_TD: see `int8_quant`.
        start_E: [E] int32 first row of each group, ascending; None for all rows.
        count_E: [E] int32 rows of each group.
    """
    x_TD = x_TD.contiguous()
    D = x_TD.shape[-1]
    scale = torch.empty((*x_TD.shape[:-1], 1), dtype=torch.float32, device=x_TD.device)
    out = Quantized(torch.empty(x_TD.shape, dtype=torch.int8, device=x_TD.device), scale)
    if x_TD.numel():
        block = next_power_of_2(D)
        _int8_quant_kernel[(scale.numel(),)](
            x_ptr=x_TD,
            q_ptr=out.q,
            scale_ptr=scale,
            start_ptr=scale if start_E is None else start_E[-1:],
            count_ptr=scale if count_E is None else count_E[-1:],
            D=D,
            B=block,
            LIMITED=start_E is not None,
            num_warps=min(8, max(1, block // 512)),
            **launch_options(),
        )
    return out


def _launch_int8_quant(x_TD: Tensor) -> Quantized:
    return launch_int8_quant(x_TD)


@operation(kernel=_launch_int8_quant)
def int8_quant(x_TD: Tensor) -> Quantized:
    """Quantize activations to int8 with a scale per row.

    scale = max|x| / 127 of the row, at least 1e-4 / 127; q = x / scale, rounded to the nearest.

    Args:
        x_TD: [..., D], any float dtype.
    """
    x = x_TD.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(_MIN_AMAX) / _MAX
    return Quantized((x / scale).round().to(torch.int8), scale)


def requantize(h: Tensor, like: Quantized, ue8m0: bool) -> Quantized:
    """Return the reference's quantization of `h` to the format of `like`.

    Args:
        h: [..., D], any float dtype.
        like: int8 or FP8.
        ue8m0: round FP8 scales up to powers of two.
    """
    if like.q.dtype == torch.int8:
        return int8_quant.reference(h)
    return act_quant.reference(h, ue8m0)
