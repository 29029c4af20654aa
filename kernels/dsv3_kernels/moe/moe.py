"""Routed experts over the tokens that chose them: gate_up, silu * up, down, weighted sum.

On a GPU three to five launches, the same whatever was chosen and none of them after a count on the
host: `permute`, unless `route_and_permute` did it, two grouped products (in FP8 a quantization
between them, fused into the first for many tokens), `unpermute`. On a CPU a loop over the experts
that are hit.

Bound by reading the weights of the experts that are hit, up to about 64 tokens an expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._triton import use_triton
from dsv3_kernels.gemm.act_quant import Quantized, act_quant_ref
from dsv3_kernels.moe.grouped_down import grouped_down_triton
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up_triton
from dsv3_kernels.moe.grouped_gemm import Stack, dequantize
from dsv3_kernels.moe.permute import Groups, permute_triton, unpermute_triton
from dsv3_kernels.ops.silu_mul import silu_mul_ref


def experts_ref(
    x: Tensor | Quantized,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    gate_up: Stack,
    down: Stack,
    ue8m0: bool = False,
    also: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Define `experts`: rows sorted by expert, two products for each, summed in that order."""
    num_local, x_TD = len(gate_up.weight), dequantize(x)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    local = ids_TK.flatten() - first_expert
    order = local.argsort(stable=True)
    # Those of other ranks' experts are in front and behind.
    before, *counts, after = torch.bincount(
        local.clamp(-1, num_local) + 1, minlength=num_local + 2
    ).tolist()
    order_M = order[before : len(order) - after]
    if not len(order_M):
        return y_TD if also is None else y_TD.add_(also())
    row_M = order_M // ids_TK.shape[1]
    h_MF = silu_mul_ref(_grouped_linear(x_TD[row_M], counts, gate_up))
    if isinstance(x, Quantized):
        h_MF = dequantize(act_quant_ref(h_MF, ue8m0))
    y_MD = _grouped_linear(h_MF, counts, down).float() * weight_TK.flatten()[order_M, None]
    y_TD.index_add_(0, row_M, y_MD)
    return y_TD if also is None else y_TD.add_(also())


def _grouped_linear(x_MD: Tensor, counts: list[int], w: Stack) -> Tensor:
    """Return x W_e^T, where the first counts[0] rows belong to expert 0, and so on."""
    groups = enumerate(x_MD.split(counts))
    return torch.cat([F.linear(x, w.matrix(e, x.dtype)) for e, x in groups if counts[e]])


def experts_triton(
    x: Tensor | Quantized,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    gate_up: Stack,
    down: Stack,
    ue8m0: bool = False,
    also: Callable[[], Tensor] | None = None,
    spread: int = 1,
    groups: Groups | None = None,
) -> Tensor:
    """Launch `experts`; the weighted rows are held in the dtype of `x`, or in bfloat16."""
    num_local = len(gate_up.weight)
    if isinstance(x, Tensor):
        x = x.contiguous()  # it may lie among what came with it from another rank
    if groups is None:
        groups = permute_triton(ids_TK.contiguous(), first_expert, num_local)
    assert groups.slot_TK is not None
    rows = -(-ids_TK.numel() // (num_local * spread))
    dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
    h = grouped_gate_up_triton(x, gate_up, groups, rows, ue8m0)
    y_MD = grouped_down_triton(h, down, groups, rows, dtype, weight_TK)
    return unpermute_triton(y_MD, groups.slot_TK, None, None if also is None else also())


def experts(
    x: Tensor | Quantized,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    gate_up: Stack,
    down: Stack,
    ue8m0: bool = False,
    also: Callable[[], Tensor] | None = None,
    spread: int = 1,
    groups: Groups | None = None,
) -> Tensor:
    """Return this rank's part of sum_k weight_k * expert_k(x).

    Args:
        x: [T, D] hidden states, or those quantized 1x128: then the products are in FP8 (both
            matrices are, D and F are multiples of 128) and what lies between is quantized, too.
        ids_TK: [T, K] int64 global expert ids; -1 and those of other ranks are skipped.
        weight_TK: [T, K] float32.
        first_expert: global id of this rank's first expert.
        gate_up: [E, 2F, D] of the experts that this rank holds, in the dtype of `x` or FP8 (then F
            is a multiple of 128).
        down: [E, D, F].
        ue8m0: scales of activations are powers of two.
        also: returns [T, D] to be added, any float dtype. It is called last, so what it returns may
            come from another stream.
        spread: `ids_TK` are spread over that many times the experts held here; it decides the
            speed alone.
        groups: what `permute` says of `ids_TK`, where someone has it: saves a launch.

    Returns:
        [T, D] float32; the sum over ranks is the layer's output.
    """
    form = (x, ids_TK, weight_TK, first_expert, gate_up, down, ue8m0, also)
    return experts_triton(*form, spread, groups) if use_triton(ids_TK) else experts_ref(*form)
