"""The experts' second product, with every row multiplied by the weight of its entry.

    y[m] = weight[m] * W_down h[m], with W_down of the expert of row m

`grouped_gemm` describes the tiles and their bounds.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.gemm.act_quant import Quantized, dequantize
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


@triton.jit
def _down_kernel(
    h,
    h_scale,
    w,
    w_scale,
    w_zero,
    y,
    entries,
    weights,
    starts,
    counts,
    E,
    D: tl.constexpr,
    F: tl.constexpr,
    FP8: tl.constexpr,
    BITS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute tiles of the second product; every row is multiplied by its entry's weight."""
    in_turn()
    tiles_E = row_tiles(counts, E, E_PAD, BLOCK_M, (D + BLOCK_N - 1) // BLOCK_N)
    for tile in range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0)):
        e, block, row, real = place(tile, tiles_E, counts, starts, E_PAD, BLOCK_M)
        low = block * BLOCK_N
        first_scale = e * scales_of(D, F, GROUP)
        if BITS > 0 and not QUANTIZED:
            acc = multiply_integers(
                x=h,
                w=w + e * D * (F * BITS // 8),
                w_scale=w_scale + first_scale,
                w_zero=w_zero + first_scale,
                rows=row,
                low=low,
                N=D,
                D=F,
                GATED=False,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                BITS=BITS,
                GROUP=GROUP,
                ZEROS=ZEROS,
                INTERPRETED=INTERPRETED,
                STAGES=STAGES,
            )
        elif BLOCK_M < 64:
            acc = multiply_few(
                x=h,
                x_scale=h_scale,
                w=w + e * D * F,
                w_scale=w_scale + first_scale,
                rows=row,
                low=low,
                N=D,
                D=F,
                GATED=False,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                FP8=FP8,
                QUANTIZED=QUANTIZED,
                NATIVE=NATIVE,
                INTERPRETED=INTERPRETED,
            )
        else:
            acc, _ = multiply_many(
                x=h,
                x_scale=h_scale,
                w=w,
                w_scale=w_scale + first_scale,
                rows=row,
                first_row=e * D,
                low=low,
                N=D,
                D=F,
                GATED=False,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                FP8=FP8,
                QUANTIZED=QUANTIZED,
                NATIVE=NATIVE,
                TMA=TMA,
                INTERPRETED=INTERPRETED,
            )
        acc *= tl.load(weights + tl.load(entries + row))[:, None]
        feature = low + tl.arange(0, BLOCK_N)
        mask = real[:, None] & (feature < D)[None, :]
        tl.store(y + row[:, None] * D + feature[None, :], acc, mask=mask)


def _launch_grouped_down(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    rows: int,
    dtype: torch.dtype,
    weight_TK: Tensor,
) -> Tensor:
    launch = launch_of(h, w, False, rows)
    num_experts, hidden = w.weight.shape[:2]
    num_rows = len(launch.x)
    y_MD = torch.empty((num_rows, hidden), dtype=dtype, device=launch.x.device)
    if num_rows:
        _down_kernel[launch.grid(hidden, num_rows)](
            h=launch.x,
            h_scale=launch.x_scale,
            w=launch.matrices(),
            w_scale=launch.w_scale,
            w_zero=launch.w_zero,
            y=y_MD,
            entries=groups.entry_M,
            weights=weight_TK.contiguous(),
            starts=groups.start_E,
            counts=groups.count_E,
            E=num_experts,
            D=hidden,
            F=launch.x.shape[1],
            **launch.constants(),
            **launch_options(),
        )
    return y_MD


@operation(kernel=_launch_grouped_down)
def grouped_down(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    rows: int,
    dtype: torch.dtype,
    weight_TK: Tensor,
) -> Tensor:
    """Return W_down h of every row's expert, times the weight of its entry.

    Args:
        h: [M, F], float, or quantized as the matrices are.
        w: [E, D, F]; if both are FP8, F must be a multiple of 128.
        groups: the rows of each expert.
        rows: expected rows per expert; affects only the speed. Not used by the reference.
        dtype: of the result.
        weight_TK: [T, K] float32.

    Returns:
        y_MD: [M, D]; rows of no expert are undefined (0 from the reference).
    """
    h_MF = dequantize(h)
    y_MD = h_MF.new_zeros((len(h_MF), w.weight.shape[1]), dtype=torch.float32)
    for expert_rows, product in products(h_MF, w, groups):
        y_MD[expert_rows] = product.float()
    y_MD *= weight_TK.flatten()[groups.entry_M.clamp_min(0), None]
    return y_MD.to(dtype)
