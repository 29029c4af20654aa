"""Matrices of integers of 4 or 8 bits with a scale per group of columns of each row.

    w[n, k] = q[n, k] * scale[n, k // group]

int8 values are stored as such; of int4, a byte holds two values plus 8, the first in its low bits
(the order of compressed-tensors). Instead of 8 a group may have a zero of its own (AWQ). On CPUs,
torch's own products want int4 in another order: `pack_for_cpu` rearranges a matrix in place.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._cast import as_dtype
from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.operation import operation

# Rows and columns of a program.
_ROWS, _COLUMNS = 16, 128
# Most rows of x that torch multiplies by int8 as they are; for more, a product with the integers
# in the dtype of x is faster (measured on AVX-512: 1.3 times at 16 rows with bfloat16).
_FEW_ROWS = 8
_CPU_GROUPS = (32, 64, 128, 256)


class Integers(NamedTuple):
    """A matrix of integers, or a stack of matrices.

    Attributes:
        q: [..., N, D] int8, or [..., N, D / 2] uint8.
        scale: [..., N, groups], any float dtype; see `pack_for_cpu`.
        group: columns that share a scale.
        packed: True after `pack_for_cpu`.
        zero: [..., N, groups] uint8, added to the values of int4; None for 8.
    """

    q: Tensor
    scale: Tensor
    group: int
    packed: bool = False
    zero: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Device of the matrix."""
        return self.q.device

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 if self.q.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.q.shape[-2], self.q.shape[-1] * 8 // self.bits


def has_cpu_product(bits: int, group: int, rows: int, cols: int) -> bool:
    """Return True if torch multiplies such a matrix on a CPU.

    Of int8 it takes one scale per row, and ends the process for columns that are not a multiple of
    a vector register's.
    """
    if bits == 8:
        return group >= cols and cols > 0 and cols % 32 == 0
    return group in _CPU_GROUPS and cols % group == 0 and rows % 16 == 0


def pack_for_cpu(w: Integers) -> Integers:
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
        return w._replace(scale=scale, packed=True)
    q_ND = torch.stack((w.q & 15, w.q >> 4), -1).view(rows, cols).int()
    w.q.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_ND, 1).view_as(w.q))
    scale_gN = w.scale.t().to(torch.bfloat16)
    pairs = memory.view(cols // w.group, rows, 2)
    pairs[..., 0] = scale_gN
    pairs[..., 1] = 0
    return w._replace(scale=pairs, packed=True)


def cpu_product(x_TD: Tensor, w: Integers) -> Tensor:
    """Return x W^T by torch's product of bfloat16 rows, which sums in float32.

    Args:
        x_TD: [T, D] of any float dtype; rounded to bfloat16 for int4 and for few rows.
        w: for which `has_cpu_product` is True, after `pack_for_cpu`.
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


@triton.jit
def _load_integers(q_ptr, row, first, rows, cols, BITS: tl.constexpr, C: tl.constexpr):
    """Load C integers of each row from column `first` on, as float32; of int4 without its zero."""
    BYTES: tl.constexpr = C * BITS // 8
    row_bytes = cols * BITS // 8
    at = first * BITS // 8 + tl.arange(0, BYTES)[None, :]
    q = tl.load(q_ptr + row * row_bytes + at, mask=(row < rows) & (at < row_bytes), other=0)
    if BITS == 8:
        return q.to(tl.float32)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return tl.interleave(q & 15, q >> 4).to(tl.float32)


@triton.jit
def _dequant_kernel(
    q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    cols,
    groups,
    group,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Dequantize R rows and C columns."""
    in_turn()
    row = tl.program_id(0) * R + tl.arange(0, R).to(tl.int64)[:, None]
    first = tl.program_id(1) * C
    col = first + tl.arange(0, C)[None, :]
    mask = (row < rows) & (col < cols)
    q = _load_integers(q_ptr, row, first, rows, cols, BITS, C)
    of_group = row * groups + col // group
    if ZEROS:
        q -= tl.load(zero_ptr + of_group, mask=mask, other=0).to(tl.float32)
    elif BITS == 4:
        q -= 8.0
    scale = tl.load(scale_ptr + of_group, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * cols + col, (q * scale).to(out_ptr.dtype.element_ty), mask=mask)


def _launch_int_dequant(w: Integers, dtype: torch.dtype) -> Tensor:
    rows, cols = w.shape
    stacked = w.q.numel() // max(1, w.q.shape[-2] * w.q.shape[-1]) * rows
    out = torch.empty((*w.q.shape[:-1], cols), dtype=dtype, device=w.device)
    if out.numel():
        _dequant_kernel[(cdiv(stacked, _ROWS), cdiv(cols, _COLUMNS))](
            q_ptr=w.q.contiguous(),
            scale_ptr=w.scale.contiguous(),
            zero_ptr=w.scale if w.zero is None else w.zero.contiguous(),
            out_ptr=out,
            rows=stacked,
            cols=cols,
            groups=w.scale.shape[-1],
            group=w.group,
            BITS=w.bits,
            ZEROS=w.zero is not None,
            R=_ROWS,
            C=_COLUMNS,
            **launch_options(),
        )
    return out


@operation(kernel=_launch_int_dequant)
def int_dequant(w: Integers, dtype: torch.dtype) -> Tensor:
    """Return (q - zero) * scale of its group, [..., N, D] in `dtype`; not of a packed matrix."""
    assert not w.packed
    q = w.q
    if w.bits == 4:
        zero = 8 if w.zero is None else _by_column(w.zero.to(torch.int8), w)
        q = torch.stack((q & 15, q >> 4), -1).flatten(-2).to(torch.int8) - zero
    return (q * _by_column(w.scale.float(), w)).to(dtype)


def _by_column(by_group: Tensor, w: Integers) -> Tensor:
    """Return a value for every column, or one that is broadcast to all."""
    if by_group.shape[-1] == 1:
        return by_group
    return by_group.repeat_interleave(w.group, -1)[..., : w.shape[1]]
