"""Routed experts over the tokens that chose them: gate_up, silu * up, down, weighted sum.

Bound by reading the weights of the experts that are hit, up to about 64 tokens an expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels.silu_mul import silu_mul


def experts_ref(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    num_local: int,
    gate_up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
) -> Tensor:
    """Define `experts`: rows sorted by expert, two products for each, summed in that order."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    local = ids_TK.flatten() - first_expert
    order = local.argsort(stable=True)
    # Those of other ranks' experts are in front and behind.
    before, *counts, after = torch.bincount(
        local.clamp(-1, num_local) + 1, minlength=num_local + 2
    ).tolist()
    order_M = order[before : len(order) - after]
    if not len(order_M):
        return y_TD
    row_M = order_M // ids_TK.shape[1]
    h_MF = silu_mul(_grouped_linear(x_TD[row_M], counts, gate_up))
    y_MD = _grouped_linear(h_MF, counts, down).float() * weight_TK.flatten()[order_M, None]
    return y_TD.index_add_(0, row_M, y_MD)


def _grouped_linear(x_MD: Tensor, counts: list[int], weight: Callable[[int], Tensor]) -> Tensor:
    """Return x W_e^T, where the first counts[0] rows belong to expert 0, and so on."""
    groups = enumerate(x_MD.split(counts))
    return torch.cat([F.linear(x, weight(expert)) for expert, x in groups if counts[expert]])


def experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    num_local: int,
    gate_up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
) -> Tensor:
    """Return this rank's part of sum_k weight_k * expert_k(x).

    Args:
        x_TD: [T, D] hidden states.
        ids_TK: [T, K] int64 global expert ids; those of other ranks are skipped.
        weight_TK: [T, K] float32.
        first_expert: global id of this rank's first expert.
        num_local: experts this rank holds.
        gate_up: local expert -> [2F, D] matrix in the dtype of `x_TD`.
        down: local expert -> [D, F] matrix.

    Returns:
        [T, D] float32; the sum over ranks is the layer's output.
    """
    return experts_ref(x_TD, ids_TK, weight_TK, first_expert, num_local, gate_up, down)
