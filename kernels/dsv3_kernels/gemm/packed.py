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

# Up to this many rows of x go to torch's product with int8. For more, a product with the integers
# in the dtype of x is faster (measured on AVX-512: 1.3 times at 16 rows with bfloat16).
_FEW_ROWS = 8
# From this many rows of x on, it is faster to convert int4 to bfloat16 first: torch's product does
# so again for every four rows (measured on AVX-512: 2,048 rows take a seventh of the time).
_MANY_ROWS = 160
_GROUPS = (32, 64, 128, 256)
_BLOCK = 64  # rows of a block of int4
_AT_ONCE = 4  # blocks that are converted at a time, to stay in a processor's cache


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

    For int8 it takes one scale per row, and crashes the process if the columns do not fill whole
    vector registers.
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
    num_rows, num_columns = x_TD.shape[0], w.q.shape[0]
    if not num_rows:
        return x_TD.new_empty((0, num_columns))
    x = as_dtype(x_TD, torch.bfloat16).contiguous()
    if w.q.dtype == torch.uint8:
        if num_rows >= _MANY_ROWS and num_columns % _BLOCK == 0 and _has_blocks():
            y = _multiply_unpacked(x, w)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, w.q, w.group, w.scale)
    elif num_rows <= _FEW_ROWS:
        y = torch.ops.aten._weight_int8pack_mm(x, w.q, w.scale)
    else:
        y = F.linear(x_TD, w.q.to(x_TD.dtype)).mul_(w.scale)
    return as_dtype(y, x_TD.dtype)


def _has_blocks() -> bool:
    """Return True if torch's order of int4 on this CPU is that of `_multiply_unpacked`."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _multiply_unpacked(x_TD: Tensor, w: PackedIntegers) -> Tensor:
    """Return x W^T of int4 converted to bfloat16, some blocks of 64 rows at a time.

    A block holds, column by column, 32 bytes: row i in the low bits, row i + 32 in the high ones.
    """
    num_columns, half_D = w.q.shape
    y_TF = x_TD.new_empty((len(x_TD), num_columns))
    blocks = w.q.view(num_columns // _BLOCK, 2 * half_D, _BLOCK // 2)
    scales = w.scale[..., 0].unflatten(1, (-1, 1, _BLOCK)).transpose(0, 1)  # of a block: [g, 1, 64]
    parts = zip(
        y_TF.split(_BLOCK * _AT_ONCE, 1),
        blocks.split(_AT_ONCE),
        scales.split(_AT_ONCE),
        strict=True,
    )
    for y, q, scale in parts:
        w_block = torch.cat((q & 15, q >> 4), -1).to(torch.bfloat16).sub_(8)  # [blocks, D, 64]
        w_block.unflatten(1, (-1, w.group)).mul_(scale)
        y.copy_(x_TD @ w_block.transpose(0, 1).flatten(1))
    return y_TF
