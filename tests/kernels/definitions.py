"""The definition of attention, for one query at a time in float64."""

import math

import torch
from torch import Tensor


def attend(q_X: Tensor, k_SX: Tensor, v_SV: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return the softmax average of the values and the log-sum-exp; (0, -inf) without keys."""
    if not len(k_SX):
        return torch.zeros(v_SV.shape[1], dtype=torch.float64), -math.inf
    score = k_SX.double() @ q_X.double() * scale
    return score.softmax(0) @ v_SV.double(), float(score.logsumexp(0))
