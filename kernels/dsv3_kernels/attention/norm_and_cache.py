"""Both ways on from a projection: the query's latent is normalized, the other goes to the cache.

`add_rmsnorm` without an addition, and `rope_and_cache`, in one launch of its kernel: neither waits
for the other, and for few tokens either alone is no longer than a launch takes. Bound by latency
for few tokens, by bytes for many.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import triton, use_triton
from dsv3_kernels.attention.rope_and_cache import ToCache, launch_entries, rope_and_cache_ref
from dsv3_kernels.gemm._e4m3 import e4m3_view
from dsv3_kernels.gemm.act_quant import BLOCK, Quantized
from dsv3_kernels.ops.rmsnorm import add_rmsnorm_ref


def norm_and_cache_ref(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, into: ToCache
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Define `norm_and_cache`: one after the other."""
    _, h_TA, quantized = add_rmsnorm_ref(x_TA, None, weight_A, into[2], quant, ue8m0)
    return h_TA, quantized, rope_and_cache_ref(*into)


def norm_and_cache_triton(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, into: ToCache
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Launch two programs per token."""
    T, A = x_TA.shape
    assert x_TA.stride(1) == 1 and len(into[0]) == T, f"{x_TA.stride()=} {into[0].shape=}"
    assert not quant or A % BLOCK == 0, f"{x_TA.shape=}"
    h_TA = torch.empty((T, A), dtype=x_TA.dtype, device=x_TA.device)
    out = Quantized.empty(x_TA.shape, x_TA.device) if quant else None
    outputs = (h_TA, h_TA, h_TA) if out is None else (h_TA, e4m3_view(out.q), out.scale)
    blocks = triton.next_power_of_2(triton.cdiv(A, BLOCK))
    norm = x_TA, weight_A, *outputs, x_TA.stride(0), A, blocks, quant, ue8m0
    return h_TA, out, launch_entries(*into, norm)


def norm_and_cache(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, into: ToCache
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Do `add_rmsnorm` (without an addition) and `rope_and_cache`.

    Args:
        x_TA: [T, A], any float dtype; rows may be strided.
        weight_A: [A] float32.
        quant: also return the norm of x in FP8; then A is a multiple of 128.
        ue8m0: with scales that are powers of two.
        into: the arguments of `rope_and_cache`, of as many rows; their eps is that of both norms.

    Returns:
        rmsnorm(x), act_quant of that or None, and what `rope_and_cache` returns.
    """
    op = norm_and_cache_triton if use_triton(x_TA) else norm_and_cache_ref
    return op(x_TA, weight_A, quant, ue8m0, into)
