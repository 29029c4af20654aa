"""Matrices of integers as torch's own products on CPUs take them: bfloat16 rows, float32 sums.

`pack_for_cpu` rearranges a matrix in place. int4 is stored in blocks of 64 rows, column by column,
and has a scale and a zero per group; int8 stays as it is, with a bfloat16 scale per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._cast import as_dtype
from dsv3_kernels.gemm.integers import Integers

# Most rows of x that torch multiplies by int8 as they are; for more, a product with the integers
# in the dtype of x is faster (measured on AVX-512: 1.3 times at 16 rows with bfloat16).
_FEW_ROWS = 8
_GROUPS = (32, 64, 128, 256)


class PackedIntegers(NamedTuple):
    """A matrix from `pack_for_cpu`.

    Attributes:
        q: [N, D] int8, or [N, D / 2] uint8 in torch's order.
        scale: [N] bfloat16 of int8; of int4 [groups, N, 2], scales and zeros.
        group: columns that share a scale.
    """

    q: Tensor
    scale: Tensor
    group: int


def has_cpu_product(bits: int, group: int, rows: int, cols: int) -> bool:
    """Return True if torch multiplies such a matrix on a CPU.

    Of int8 it takes one scale per row, and ends the process for columns that are not a multiple of
    a vector register's.
    """
    if bits == 8:
        return group >= cols and cols > 0 and cols % 32 == 0
    return group in _GROUPS and cols % group == 0 and rows % 16 == 0


def pack_for_cpu(w: Integers) -> PackedIntegers:
    """Rearrange a matrix with float32 scales in place for torch's product on CPUs.

    The memory of the scales then holds bfloat16 scales, of int4 with a zero each; the scales must
    be exact in bfloat16.

    Returns:
        The matrix, with a view of its scales as the product takes them.
    """
    assert w.scale.dtype == torch.float32 and w.scale.is_contiguous(), f"{w.scale.dtype=}"
    rows, cols = w.shape
    memory = w.scale.view(-1).view(torch.bfloat16)
    if w.bits == 8:
        scale = memory[:rows]
        scale.copy_(w.scale.view(-1).to(torch.bfloat16))
        return PackedIntegers(w.q, scale, w.group)
    q_ND = torch.stack((w.q & 15, w.q >> 4), -1).view(rows, cols).int()
    w.q.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_ND, 1).view_as(w.q))
    scale_gN = w.scale.t().to(torch.bfloat16)
    pairs = memory.view(cols // w.group, rows, 2)
    pairs[..., 0] = scale_gN
    pairs[..., 1] = 0
    return PackedIntegers(w.q, pairs, w.group)


def cpu_product(x_TD: Tensor, w: PackedIntegers) -> Tensor:
    """Return x W^T by torch's product of bfloat16 rows, which sums in float32.

    Args:
        x_TD: [T, D] of any float dtype; rounded to bfloat16 for int4 and for few rows.
        w: the matrix.
    """
    num_rows = x_TD.shape[0]
    if not num_rows:
        return x_TD.new_empty((0, w.q.shape[0]))
    x = as_dtype(x_TD, torch.bfloat16).contiguous()
    if w.q.dtype == torch.uint8:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, w.q, w.group, w.scale)
    elif num_rows <= _FEW_ROWS:
        y = torch.ops.aten._weight_int8pack_mm(x, w.q, w.scale)
    else:
        y = F.linear(x_TD, w.q.to(x_TD.dtype)).mul_(w.scale)
    return as_dtype(y, x_TD.dtype)
