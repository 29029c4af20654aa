"""The experts' first product, with the gated activation and in FP8 the quantization fused in.

    h[m] = silu(W_gate x[m]) * (W_up x[m]), W those of the expert of row m

How tiles are shared out and what bounds them: `grouped_gemm`.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.gemm._e4m3 import e4m3_view
from dsv3_kernels.gemm.act_quant import BLOCK, Quantized, act_quant, quantize_block
from dsv3_kernels.moe._grouped_tiles import multiply_few, multiply_many, place, row_tiles
from dsv3_kernels.moe.grouped_gemm import Stack, dequantize, launch_of, products
from dsv3_kernels.moe.permute import Groups
from dsv3_kernels.ops.silu_mul import silu_mul_ref


def _sorted_rows(x_TD: Tensor, groups: Groups) -> Tensor:
    """Return every row's token; rows of no expert repeat the first."""
    if groups.entry_M is None or groups.slot_TK is None or not len(x_TD):
        return x_TD
    return x_TD[groups.entry_M.clamp_min(0) // groups.slot_TK.shape[1]]


def grouped_gate_up_ref(
    x: Tensor | Quantized, w: Stack, groups: Groups, ue8m0: bool = False
) -> Tensor | Quantized:
    """Define `grouped_gate_up`; rows of no expert are 0."""
    x_MD = _sorted_rows(dequantize(x), groups)
    h_MF = x_MD.new_zeros((len(x_MD), w.weight.shape[1] // 2))
    for rows, gate_up in products(x_MD, w, groups):
        h_MF[rows] = silu_mul_ref(gate_up)
    return h_MF if isinstance(x, Tensor) else act_quant(h_MF, ue8m0)


@triton.jit
def _gate_up_kernel(
    x,
    x_scale,
    w,
    w_scale,
    h,
    h_scale,
    entries,
    starts,
    counts,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    INTERPRETED: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Share out tiles of silu(gate) * up: BLOCK_N features, computed from as many of either."""
    in_turn()
    tiles_E = row_tiles(counts, E, E_PAD, BLOCK_M, (F + BLOCK_N - 1) // BLOCK_N)
    blocks_f: tl.constexpr = (2 * F + 127) // 128
    blocks_d: tl.constexpr = (D + 127) // 128
    for tile in range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0)):
        e, block, row, real = place(tile, tiles_E, counts, starts, E_PAD, BLOCK_M)
        low = block * BLOCK_N
        token = row
        if TOP_K > 0:
            token = (tl.load(entries + row) // TOP_K).to(tl.int64)
        at_scale = w_scale + e * blocks_f * blocks_d
        # fmt: off
        if BLOCK_M < 64:
            both = multiply_few(
                x, x_scale, w + e * 2 * F * D, at_scale, token, low, F, D, True,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, INTERPRETED,
            )
            both = tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
            gate, up = tl.split(both)
        else:
            gate, up = multiply_many(
                x, x_scale, w, at_scale, token, e * 2 * F, low, F, D, True,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, TMA, INTERPRETED,
            )
        # fmt: on
        value = gate / (1.0 + tl.exp(-gate)) * up
        feature = low + tl.arange(0, BLOCK_N)
        at = row[:, None] * F + feature[None, :]
        mask = real[:, None] & (feature < F)[None, :]
        if QUANT:
            quantized, scale = quantize_block(value, UE8M0, KIND == 2)
            tl.store(h + at, quantized, mask=mask)
            tl.store(h_scale + row * (F // 128) + low // 128, scale, mask=real)
        else:
            tl.store(h + at, value, mask=mask)


def grouped_gate_up_triton(
    x: Tensor | Quantized, w: Stack, groups: Groups, rows: int, ue8m0: bool = False
) -> Tensor | Quantized:
    """Launch the gated product; outputs of tiles too narrow for it are quantized by another."""
    launch = launch_of(x, w, True, rows)
    num_experts, inner = len(w.weight), w.weight.shape[1] // 2
    assert w.block_scale is None or inner % BLOCK == 0, f"{inner=}"
    top_k = 0 if groups.slot_TK is None else groups.slot_TK.shape[1]
    num_rows = len(launch.x) * max(1, top_k)
    fused = isinstance(x, Quantized) and launch.tile.features == BLOCK
    dtype = x.dtype if isinstance(x, Tensor) else torch.float32
    out = Quantized.empty((num_rows, inner), launch.x.device) if fused else None
    h = e4m3_view(out.q) if out else launch.x.new_empty((num_rows, inner), dtype=dtype)
    if num_rows:
        _gate_up_kernel[launch.grid(inner, num_rows)](
            launch.x,
            launch.x_scale,
            launch.matrices(),
            launch.w_scale,
            h,
            out.scale if out else h,
            groups.count_E if groups.entry_M is None else groups.entry_M,
            groups.start_E,
            groups.count_E,
            num_experts,
            F=inner,
            D=launch.x.shape[1],
            TOP_K=top_k,
            QUANT=fused,
            UE8M0=ue8m0,
            **launch.constants(),
            **launch_options(),
        )
    if out is not None:
        return out
    return act_quant(h, ue8m0) if isinstance(x, Quantized) else h


def grouped_gate_up(
    x: Tensor | Quantized, w: Stack, groups: Groups, rows: int, ue8m0: bool = False
) -> Tensor | Quantized:
    """Return silu(W_gate x) * (W_up x) of every row's expert.

    Args:
        x: [T, D] where `groups` are sorted entries (row m is token entry_M[m] // K), else [M, D];
            float, or quantized 1x128 (then the matrices are FP8).
        w: [E, 2F, D], the gate in the first half; FP8 needs F, and for quantized rows D, to be
            multiples of 128.
        groups: which rows belong to which expert.
        rows: how many rows an expert can expect; it decides the speed alone.
        ue8m0: scales of the result are powers of two.

    Returns:
        h_MF: [M, F], of the dtype of `x`, quantized from float32 if `x` is; rows of no expert are
            undefined.
    """
    if use_triton(w.weight):
        return grouped_gate_up_triton(x, w, groups, rows, ue8m0)
    return grouped_gate_up_ref(x, w, groups, ue8m0)
