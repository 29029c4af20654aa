"""Products of many int8 rows with an int8 matrix, both with a scale per row.

    y[m, n] = sx[m] * sw[n] * (sum over k of x[m, k] * w[n, k])

Sums are exact in int32. Bound by matrix units, twice as fast in int8 as in bfloat16; GPUs without
FP8 have them, too. The kernel is that of many rows in `fp8_gemm`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm.act_quant import Quantized, dequantize
from dsv3_kernels.gemm.fp8_gemm import multiply_many_rows
from dsv3_kernels.gemm.integers import Integers, int_dequant
from dsv3_kernels.operation import operation


def _launch_int8_gemm(x: Quantized, w: Integers, dtype: torch.dtype) -> Tensor:
    assert x.q.is_contiguous() and w.q.is_contiguous(), f"{x.q.stride()=} {w.q.stride()=}"
    assert w.q.dtype == torch.int8 and w.group == w.shape[1] == x.q.shape[1], f"{w.group=}"
    assert w.group % BLOCK == 0, f"{w.shape=}"
    y_TF = torch.empty((len(x.q), w.shape[0]), dtype=dtype, device=x.device)
    if y_TF.numel():
        multiply_many_rows(x, w.q, w.scale, y_TF)
    return y_TF


@operation(kernel=_launch_int8_gemm)
def int8_gemm(x: Quantized, w: Integers, dtype: torch.dtype) -> Tensor:
    """Return x W^T of int8 values, rounded once.

    Args:
        x: [T, D] int8 with a scale per row, D a multiple of 128.
        w: [F, D] int8 with a scale per row.
        dtype: of the result: bfloat16 or float32.
    """
    return F.linear(dequantize(x), int_dequant.reference(w, torch.float32)).to(dtype)
