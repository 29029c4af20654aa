"""The FP8 form of a latent cache entry: C e4m3 values, a float32 scale per 128, R bf16 values.

For V3 these are 512 + 16 + 128 = 656 bytes, in the order read by V3.2's sparse kernels. The rotated
key stays bf16: it is small, and its errors would grow with position. Bound by bytes.
"""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv
from dsv3_kernels.fp8_format import BLOCK, FP8, quantize
from dsv3_kernels.gemm._e4m3 import e4m3_floats


def scale_bytes(value_dim: int) -> int:
    """Return the bytes of the scales of an entry of C = `value_dim` quantized values."""
    return 4 * cdiv(value_dim, BLOCK)


def packed_bytes(value_dim: int, rope_dim: int) -> int:
    """Return the bytes of an entry of C = `value_dim` and R = `rope_dim` values with its scales."""
    return value_dim + scale_bytes(value_dim) + 2 * rope_dim


def pack_latent(entry_TX: Tensor, value_dim: int) -> Tensor:
    """Quantize cache entries, with a scale for each block of 128 latents.

    Args:
        entry_TX: [..., C + R] float: latent, then rotated key.
        value_dim: C; its last block may be short.

    Returns:
        [..., packed_bytes(C, R)] uint8.
    """
    x_TC = entry_TX[..., :value_dim].float()
    k_TR = entry_TX[..., value_dim:]
    blocks = cdiv(value_dim, BLOCK)
    padded = torch.nn.functional.pad(x_TC, (0, blocks * BLOCK - value_dim))
    q, scale_Tc = quantize(padded.unflatten(-1, (blocks, BLOCK)))
    parts = (q.flatten(-2)[..., :value_dim], scale_Tc, k_TR.to(torch.bfloat16))
    # A reduction over no rows leaves strides that `contiguous` keeps and `view` refuses.
    dense = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return torch.cat([part.view(torch.uint8) for part in dense], -1)


def unpack_latent(packed_TY: Tensor, value_dim: int, dtype: torch.dtype) -> Tensor:
    """Dequantize packed cache entries; [..., C + R] in `dtype`."""
    end = value_dim + scale_bytes(value_dim)
    q, scale, key = packed_TY.tensor_split([value_dim, end], -1)
    q_TC = e4m3_floats(q.contiguous().view(FP8))
    scale_Tc = scale.contiguous().view(torch.float32)
    k_TR = key.contiguous().view(torch.bfloat16)
    by_value = scale_Tc.repeat_interleave(BLOCK, -1)[..., :value_dim]
    return torch.cat(((q_TC * by_value).to(dtype), k_TR.to(dtype)), -1)


def packed_views(packed_SY: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return views of packed entries: scales of the latents' blocks, and rotated keys."""
    end = value_dim + scale_bytes(value_dim)
    return packed_SY[:, value_dim:end].view(torch.float32), packed_SY[:, end:].view(torch.bfloat16)
