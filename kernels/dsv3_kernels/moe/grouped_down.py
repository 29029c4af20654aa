"""The experts' second product, every row times the weight of its entry.

    y[m] = weight[m] * W_down h[m], W_down that of the expert of row m

How tiles are shared out and what bounds them: `grouped_gemm`.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.moe._grouped_tiles import multiply_few, multiply_many, place, row_tiles
from dsv3_kernels.moe.grouped_gemm import Stack, dequantize, launch_of, products
from dsv3_kernels.moe.permute import Groups


def grouped_down_ref(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    dtype: torch.dtype,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Define `grouped_down`; rows of no expert are 0."""
    h_MF = dequantize(h)
    y_MD = h_MF.new_zeros((len(h_MF), w.weight.shape[1]), dtype=torch.float32)
    for rows, product in products(h_MF, w, groups):
        y_MD[rows] = product.float()
    if weight_TK is not None:
        assert groups.entry_M is not None
        y_MD *= weight_TK.flatten()[groups.entry_M.clamp_min(0), None]
    return y_MD.to(dtype)


@triton.jit
def _down_kernel(
    h,
    h_scale,
    w,
    w_scale,
    y,
    entries,
    weights,
    starts,
    counts,
    E,
    D: tl.constexpr,
    F: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Share out tiles of the second product, every row times its entry's weight."""
    in_turn()
    tiles_E = row_tiles(counts, E, E_PAD, BLOCK_M, (D + BLOCK_N - 1) // BLOCK_N)
    blocks_d: tl.constexpr = (D + 127) // 128
    blocks_f: tl.constexpr = (F + 127) // 128
    for tile in range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0)):
        e, block, row, real = place(tile, tiles_E, counts, starts, E_PAD, BLOCK_M)
        low = block * BLOCK_N
        at_scale = w_scale + e * blocks_d * blocks_f
        # fmt: off
        if BLOCK_M < 64:
            acc = multiply_few(
                h, h_scale, w + e * D * F, at_scale, row, low, D, F, False,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, INTERPRETED,
            )
        else:
            acc, _ = multiply_many(
                h, h_scale, w, at_scale, row, e * D, low, D, F, False,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, TMA, INTERPRETED,
            )
        # fmt: on
        if WEIGHTED:
            acc *= tl.load(weights + tl.load(entries + row))[:, None]
        feature = low + tl.arange(0, BLOCK_N)
        mask = real[:, None] & (feature < D)[None, :]
        tl.store(y + row[:, None] * D + feature[None, :], acc, mask=mask)


def grouped_down_triton(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    rows: int,
    dtype: torch.dtype,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Launch the second product."""
    launch = launch_of(h, w, False, rows)
    num_experts, hidden, inner = w.weight.shape
    assert weight_TK is None or groups.entry_M is not None
    num_rows = len(launch.x)
    y_MD = torch.empty((num_rows, hidden), dtype=dtype, device=launch.x.device)
    if num_rows:
        _down_kernel[launch.grid(hidden, num_rows)](
            launch.x,
            launch.x_scale,
            launch.matrices(),
            launch.w_scale,
            y_MD,
            groups.count_E if groups.entry_M is None else groups.entry_M,
            launch.x_scale if weight_TK is None else weight_TK.contiguous(),
            groups.start_E,
            groups.count_E,
            num_experts,
            D=hidden,
            F=inner,
            WEIGHTED=weight_TK is not None,
            **launch.constants(),
            **launch_options(),
        )
    return y_MD


def grouped_down(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    rows: int,
    dtype: torch.dtype,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Return W_down h of every row's expert, times the weight of its entry.

    Args:
        h: [M, F], float or quantized 1x128.
        w: [E, D, F]; FP8 for quantized rows needs F to be a multiple of 128.
        groups: which rows belong to which expert.
        rows: how many rows an expert can expect; it decides the speed alone.
        dtype: of the result.
        weight_TK: [T, K] float32, or None for no factor.

    Returns:
        y_MD: [M, D]; rows of no expert are undefined.
    """
    if use_triton(w.weight):
        return grouped_down_triton(h, w, groups, rows, dtype, weight_TK)
    return grouped_down_ref(h, w, groups, dtype, weight_TK)
