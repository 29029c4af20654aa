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
    """Define `experts`: the assignments sorted by expert, one pair of products per expert hit."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    local_M = ids_TK.flatten() - first_expert
    order_M = local_M.argsort(stable=True)
    counts = torch.bincount(local_M.clamp(-1, num_local) + 1, minlength=num_local + 2).tolist()
    start = counts[0]
    for expert, count in enumerate(counts[1:-1]):
        if count == 0:
            continue
        chosen = order_M[start : start + count]
        start += count
        row = chosen // ids_TK.shape[1]
        h = silu_mul(F.linear(x_TD[row], gate_up(expert)))
        y = F.linear(h, down(expert)).float() * weight_TK.flatten()[chosen, None]
        y_TD.index_add_(0, row, y)
    return y_TD


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
