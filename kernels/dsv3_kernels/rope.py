"""Rotary position embedding of the last dimension, in both layouts the family uses."""

import torch
from torch import Tensor


def apply_rope_ref(x_TR: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool) -> Tensor:
    """Define `apply_rope`: a pair is a complex number, multiplied by cos + i sin."""
    x = x_TR.float()
    if interleaved:
        pair = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        pair = pair * torch.complex(cos_Tr, sin_Tr)
        return torch.view_as_real(pair).flatten(-2).to(x_TR.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos_Tr - b * sin_Tr, a * sin_Tr + b * cos_Tr), -1).to(x_TR.dtype)


def apply_rope(x_TR: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool) -> Tensor:
    """Rotate pair i of the last dimension by the angle of its token.

    Args:
        x_TR: [T, R] or [T, H, R], any float dtype.
        cos_Tr: float32, broadcastable to [..., R / 2]: cosine of each pair's angle.
        sin_Tr: the sines.
        interleaved: pair i is (x[2i], x[2i+1]), as MLA stores it; else (x[i], x[i + R/2]).

    Returns:
        Same shape and dtype as `x_TR`, pairs in the layout they came in.

    Source: RoFormer (arXiv 2104.09864), eq. 34; DeepSeek's checkpoints are interleaved.
    """
    return apply_rope_ref(x_TR, cos_Tr, sin_Tr, interleaved)
