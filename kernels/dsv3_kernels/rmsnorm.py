"""Root-mean-square normalization. Bound by bytes: every value is read and written once."""

import torch
from torch import Tensor


def rmsnorm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Define `rmsnorm`: all in float32, rounded once at the end."""
    return torch.rms_norm(x_TD.float(), weight_D.shape, weight_D, eps).to(x_TD.dtype)


def rmsnorm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps).

    Args:
        x_TD: [..., D], any float dtype.
        weight_D: [D] float32.
        eps: added to the mean square.

    Returns:
        Same shape and dtype as `x_TD`.
    """
    return rmsnorm_ref(x_TD, weight_D, eps)
