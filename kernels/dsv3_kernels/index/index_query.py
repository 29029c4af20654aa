"""Index queries and the weights of their heads, as `index_scores` takes them. Bound by latency."""

import torch
from torch import Tensor

from dsv3_kernels.attention.rope import Rotation, apply_rope
from dsv3_kernels.index.index_cache import quantize_index


def index_queries(
    q_THI: Tensor, weight_STH: Tensor, rotation: Rotation, is_fp8: bool
) -> tuple[Tensor, Tensor]:
    """Rotate index queries and scale the weights of their heads.

    Args:
        q_THI: [T, H, I] as projected.
        weight_STH: [S, T, H] float32, in parts that are added in order (see `router_logits`).
        rotation: of the first dimensions of the queries, as many as it has.
        is_fp8: the keys are in FP8, so the queries are rotated by the same Hadamard matrix and
            quantized, with a scale for each head that goes into the head's weight.

    Returns:
        [T, H, I] in the dtype of `q_THI`, or float8_e4m3fn.
        [T, H] float32: weight / sqrt(H I), times the scale.
    """
    H, dim = q_THI.shape[1:]
    split = 2 * rotation.cos_Tr.shape[1]
    q_THI = torch.cat((apply_rope(q_THI[..., :split], rotation), q_THI[..., split:]), -1)
    weight_TH = weight_STH.sum(0) * (H * dim) ** -0.5
    if not is_fp8:
        return q_THI, weight_TH
    quantized, scale_TH = quantize_index(q_THI)
    return quantized, weight_TH * scale_TH
