"""Rotary frequencies with YaRN, applied at every length.

DeepSeek's demo applies YaRN only if max_seq_len > 4096, which silently changes the model: the
weights were trained with YaRN.
"""

import math

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.config_rope import RopeScaling
from dsv3_kernels import Rotation


def _yarn_ramp(dim: int, theta: float, s: RopeScaling) -> Tensor:
    """Return the degree of interpolation of each frequency, [R / 2]: 0 none, 1 the whole factor."""

    def pair_at(rotations: float) -> float:
        """Return the index of the pair that turns `rotations` times over the original context."""
        length = s.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(pair_at(s.beta_fast)), 0)
    high = min(math.ceil(pair_at(s.beta_slow)), dim - 1)
    span = high - low or 0.001  # negative if the original context is shorter than a rotation
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the angle per position of each rotary pair, [R / 2] float32.

    Source: YaRN (arXiv 2309.00071), section 3.
    """
    dim = config.qk_rope_head_dim
    powers = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequency = 1.0 / (config.rope_theta**powers)
    if config.rope_scaling is None:
        return frequency
    ramp = _yarn_ramp(dim, config.rope_theta, config.rope_scaling)
    return frequency * (1 - ramp) + frequency / config.rope_scaling.factor * ramp


class Rotary:
    """Cosines and sines of a step's positions, computed once for all layers."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequency = inverse_frequencies(config).to(device)
        self._mscale = config.cos_sin_mscale
        self._interleaved = config.rope_interleave

    def __call__(self, position_T: Tensor) -> Rotation:
        """Return the rotations of tokens at these positions."""
        angle = position_T[:, None].float() * self._frequency
        cos_Tr = angle.cos() * self._mscale
        sin_Tr = angle.sin() * self._mscale
        complex_Tr = None if angle.is_cuda else torch.complex(cos_Tr, sin_Tr)
        return Rotation(cos_Tr, sin_Tr, self._interleaved, complex_Tr)
