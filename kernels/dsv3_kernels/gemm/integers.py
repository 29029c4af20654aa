"""Matrices of integers of 4 or 8 bits with a scale per group of columns of each row.

    w[n, k] = q[n, k] * scale[n, k // group]

int8 values are stored as such; of int4, a byte holds two values plus 8, the first in its low bits
(the order of compressed-tensors). Instead of 8 a group may have a zero of its own (AWQ).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.operation import operation

# Rows and columns of a program.
_ROWS, _COLUMNS = 16, 128


class Integers(NamedTuple):
    """A matrix of integers, or a stack of matrices.

    Attributes:
        q: [..., N, D] int8, or [..., N, D / 2] uint8.
        scale: [..., N, groups], any float dtype.
        group: columns that share a scale.
        zero: [..., N, groups] uint8: the stored int4 that stands for 0; None for 8.
    """

    q: Tensor
    scale: Tensor
    group: int
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
    """Return (q - zero) * scale of its group, [..., N, D] in `dtype`."""
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
