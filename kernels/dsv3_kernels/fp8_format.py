"""The FP8 format of activations, weights and cache entries: e4m3 values that share scales."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
# Values of a row, and rows of a weight, that share a scale.
BLOCK = 128
# The largest e4m3 value.
_MAX = 448.0
# A block of zeros gets the scale of a tiny one, not 0 / 0.
_MIN_AMAX = 1e-4


def quantize(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize vectors along the last dimension, each with one scale.

    scale = max|x| / 448, at least 1e-4 / 448; q = x / scale. In kernels, `quantize_block` does the
    same.

    Args:
        x: [..., D] float32.
        ue8m0: round scales up to powers of two.

    Returns:
        q [..., D] float8_e4m3fn, and the scales [...] float32.
    """
    scale = x.abs().amax(-1).clamp_min(_MIN_AMAX) / _MAX
    if ue8m0:  # the next power of two: all mantissa bits carry into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (x / scale.unsqueeze(-1)).to(FP8), scale
