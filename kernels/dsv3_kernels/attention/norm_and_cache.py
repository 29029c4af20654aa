"""The norm of query latents and the write of cache entries, in one launch.

`add_rmsnorm` without an addition, and `rope_and_cache`, in the kernel of the latter: they are
independent, and for few tokens each takes no longer than a launch. Bound by latency for few tokens,
by bytes for many.
"""

import torch
from torch import Tensor

from dsv3_kernels.attention.rope_and_cache import (
    EntryWrite,
    QueryNorm,
    launch_entries,
    rope_and_cache,
)
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.operation import operation
from dsv3_kernels.ops.rmsnorm import add_rmsnorm


def _launch_norm_and_cache(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, write: EntryWrite
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Launch two programs per token."""
    T, A = x_TA.shape
    assert x_TA.stride(1) == 1 and len(write.kv_TX) == T, f"{x_TA.stride()=} {write.kv_TX.shape=}"
    assert not quant or A % BLOCK == 0, f"{x_TA.shape=}"
    h_TA = torch.empty((T, A), dtype=x_TA.dtype, device=x_TA.device)
    quantized = Quantized.empty(x_TA.shape, x_TA.device) if quant else None
    norm = QueryNorm(x_TA, weight_A, h_TA, quantized, ue8m0)
    return h_TA, quantized, launch_entries(write, norm)


@operation(kernel=_launch_norm_and_cache)
def norm_and_cache(
    x_TA: Tensor, weight_A: Tensor, quant: bool, ue8m0: bool, write: EntryWrite
) -> tuple[Tensor, Quantized | None, Tensor]:
    """Do `add_rmsnorm` (without an addition) and `rope_and_cache`.

    Args:
        x_TA: [T, A], any float dtype; rows may be strided.
        weight_A: [A] float32.
        quant: also return the norm of x in FP8; A must be a multiple of 128.
        ue8m0: round the FP8 scales up to powers of two.
        write: input of `rope_and_cache`, with T rows; its eps is that of both norms.

    Returns:
        rmsnorm(x), its `act_quant` or None, and the result of `rope_and_cache`.
    """
    _, h_TA, quantized = add_rmsnorm.reference(x_TA, None, weight_A, write.eps, quant, ue8m0)
    return h_TA, quantized, rope_and_cache.reference(write)
