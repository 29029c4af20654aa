"""The experts' first product, fused with the gated activation and, in FP8, the quantization.

    h[m] = silu(W_gate x[m]) * (W_up x[m]), with the matrices of the expert of row m

`grouped_gemm` describes the tiles and their bounds.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_view
from dsv3_kernels.gemm.act_quant import Quantized, dequantize, launch_act_quant, quantize_block
from dsv3_kernels.gemm.int8_quant import launch_int8_quant, requantize
from dsv3_kernels.moe._grouped_tiles import (
    multiply_few,
    multiply_integers,
    multiply_many,
    place,
    row_tiles,
    scales_of,
)
from dsv3_kernels.moe.grouped_gemm import Stack, launch_of, products
from dsv3_kernels.moe.permute import Groups
from dsv3_kernels.operation import operation
from dsv3_kernels.ops.silu_mul import silu_mul


@triton.jit
def _halves(both, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the columns of gate and of up, [BLOCK_M, BLOCK_N] each."""
    return tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit
def _gate_up_kernel(
    x,
    x_scale,
    w,
    w_scale,
    w_zero,
    h,
    h_scale,
    entries,
    starts,
    counts,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    FP8: tl.constexpr,
    BITS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    TMA: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    INTERPRETED: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute tiles of BLOCK_N features of silu(gate) * up."""
    in_turn()
    tiles_E = row_tiles(counts, E, E_PAD, BLOCK_M, (F + BLOCK_N - 1) // BLOCK_N)
    for tile in range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0)):
        e, block, row, real = place(tile, tiles_E, counts, starts, E_PAD, BLOCK_M)
        low = block * BLOCK_N
        token = (tl.load(entries + row) // TOP_K).to(tl.int64)
        first_scale = e * scales_of(2 * F, D, GROUP)
        if BITS > 0 and not QUANTIZED:
            both = multiply_integers(
                x=x,
                w=w + e * 2 * F * (D * BITS // 8),
                w_scale=w_scale + first_scale,
                w_zero=w_zero + first_scale,
                rows=token,
                low=low,
                N=F,
                D=D,
                GATED=True,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                BITS=BITS,
                GROUP=GROUP,
                ZEROS=ZEROS,
                INTERPRETED=INTERPRETED,
                STAGES=STAGES,
            )
            gate, up = _halves(both, BLOCK_M, BLOCK_N)
        elif BLOCK_M < 64:
            both = multiply_few(
                x=x,
                x_scale=x_scale,
                w=w + e * 2 * F * D,
                w_scale=w_scale + first_scale,
                rows=token,
                low=low,
                N=F,
                D=D,
                GATED=True,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                FP8=FP8,
                QUANTIZED=QUANTIZED,
                NATIVE=NATIVE,
                INTERPRETED=INTERPRETED,
            )
            gate, up = _halves(both, BLOCK_M, BLOCK_N)
        else:
            gate, up = multiply_many(
                x=x,
                x_scale=x_scale,
                w=w,
                w_scale=w_scale + first_scale,
                rows=token,
                first_row=e * 2 * F,
                low=low,
                N=F,
                D=D,
                GATED=True,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                FP8=FP8,
                QUANTIZED=QUANTIZED,
                NATIVE=NATIVE,
                TMA=TMA,
                INTERPRETED=INTERPRETED,
            )
        value = gate / (1.0 + tl.exp(-gate)) * up
        feature = low + tl.arange(0, BLOCK_N)
        at = row[:, None] * F + feature[None, :]
        mask = real[:, None] & (feature < F)[None, :]
        if QUANT:
            quantized, scale = quantize_block(value, UE8M0, NATIVE)
            tl.store(h + at, quantized, mask=mask)
            tl.store(h_scale + row * (F // 128) + low // 128, scale, mask=real)
        else:
            tl.store(h + at, value, mask=mask)


def _launch_grouped_gate_up(
    x: Tensor | Quantized, w: Stack, groups: Groups, rows: int, ue8m0: bool = False
) -> Tensor | Quantized:
    """Launch the gated product; a second launch quantizes if tiles do not hold whole scales."""
    launch = launch_of(x, w, True, rows)
    num_experts = len(w.weight)
    inner = w.weight.shape[1] // 2
    assert w.block_scale is None or w.group or inner % BLOCK == 0, f"{inner=}"
    num_rows = len(groups.entry_M)
    fused = isinstance(x, Quantized) and not w.group and launch.tile.features == BLOCK
    dtype = x.dtype if isinstance(x, Tensor) else torch.float32
    out = Quantized.empty((num_rows, inner), launch.x.device) if fused else None
    h = e4m3_view(out.q) if out else launch.x.new_empty((num_rows, inner), dtype=dtype)
    if num_rows:
        _gate_up_kernel[launch.grid(inner, num_rows)](
            x=launch.x,
            x_scale=launch.x_scale,
            w=launch.matrices(),
            w_scale=launch.w_scale,
            w_zero=launch.w_zero,
            h=h,
            h_scale=out.scale if out else h,
            entries=groups.entry_M,
            starts=groups.start_E,
            counts=groups.count_E,
            E=num_experts,
            F=inner,
            D=launch.x.shape[1],
            TOP_K=groups.row_TK.shape[1],
            QUANT=fused,
            UE8M0=ue8m0,
            **launch.constants(),
            **launch_options(),
        )
    if out is not None:
        return out
    if isinstance(x, Quantized):
        if w.group:
            return launch_int8_quant(h, groups.start_E, groups.count_E)
        return launch_act_quant(h, ue8m0, groups.start_E, groups.count_E)
    return h


@operation(kernel=_launch_grouped_gate_up)
def grouped_gate_up(
    x: Tensor | Quantized, w: Stack, groups: Groups, rows: int, ue8m0: bool = False
) -> Tensor | Quantized:
    """Return silu(W_gate x) * (W_up x) of every row's expert.

    Args:
        x: [T, D] hidden states (row m is token entry_M[m] // K): float, or quantized as the
            matrices are: both FP8, or both int8 with a scale per row.
        w: [E, 2F, D], the gate in the first half; if FP8, F (and D if rows are quantized) must be
            multiples of 128.
        groups: the rows of each expert.
        rows: expected rows per expert; affects only the speed. Not used by the reference.
        ue8m0: round the scales of the result up to powers of two.

    Returns:
        h_MF: [M, F], of the dtype of `x`, quantized from float32 if `x` is; rows of no expert are
            undefined (0 from the reference).
    """
    # Rows of no expert repeat the first token's.
    x_MD = dequantize(x)[groups.entry_M.clamp_min(0) // groups.row_TK.shape[1]]
    h_MF = x_MD.new_zeros((len(x_MD), w.weight.shape[1] // 2))
    for expert_rows, gate_up in products(x_MD, w, groups):
        h_MF[expert_rows] = silu_mul.reference(gate_up)
    return h_MF if isinstance(x, Tensor) else requantize(h_MF, x, ue8m0)
