"""Rotary position embedding of the last dimension, in both layouts of the model family."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._cast import as_dtype, as_float32
from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.operation import operation

_HEADS = 16  # per program


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotations of the pairs of a rotary embedding.

    Attributes:
        cos_Tr: [T, R / 2] float32 cosines of the angles.
        sin_Tr: [T, R / 2] float32 sines.
        interleaved: True if pair i is (x[2i], x[2i+1]), as MLA stores it; else (x[i], x[i + R/2]).
        complex_Tr: on a CPU, cos + i sin, computed once for all layers; only the reference uses it.
    """

    cos_Tr: Tensor
    sin_Tr: Tensor
    interleaved: bool
    complex_Tr: Tensor | None = None

    def tokens(self, start: int, stop: int | None = None) -> "Rotation":
        """Return the rotations of tokens start to stop."""
        some = slice(start, stop)
        complex_Tr = None if self.complex_Tr is None else self.complex_Tr[some]
        return Rotation(self.cos_Tr[some], self.sin_Tr[some], self.interleaved, complex_Tr)

    def as_complex(self) -> Tensor:
        """Return cos + i sin, [T, R / 2] complex64."""
        if self.complex_Tr is not None:
            return self.complex_Tr
        return torch.complex(self.cos_Tr, self.sin_Tr)

    def check_contiguous(self) -> None:
        """Assert that kernels can read the angles."""
        assert self.cos_Tr.is_contiguous() and self.sin_Tr.is_contiguous(), f"{self.cos_Tr.shape=}"


def apply_rope(x_TR: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pair i of the last dimension by the angle of its token.

    Args:
        x_TR: [T, R] or [T, H, R], any float dtype.
        rotation: of the tokens.

    Returns:
        Same shape and dtype as `x_TR`, pairs in the layout of the input.

    Source: RoFormer (arXiv 2104.09864), eq. 34; DeepSeek's checkpoints are interleaved.
    """
    x = as_float32(x_TR)
    if rotation.interleaved:  # a pair is a complex number, multiplied by cos + i sin
        turn = rotation.as_complex()
        if x.dim() == 3:
            turn = turn[:, None]
        turned = x.contiguous().view(torch.complex64) * turn
        return as_dtype(turned.view(torch.float32), x_TR.dtype)
    cos = rotation.cos_Tr
    sin = rotation.sin_Tr
    if x.dim() == 3:
        cos = cos[:, None]
        sin = sin[:, None]
    a, b = x.chunk(2, -1)
    return as_dtype(torch.cat((a * cos - b * sin, a * sin + b * cos), -1), x_TR.dtype)


@triton.jit
def rotate_pairs(x_row, out_row, r, mask, cos, sin, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotate pairs `r` of the rows at `x_row` by the given angles; store them at `out_row`."""
    first = 2 * r if INTERLEAVED else r
    second = 2 * r + 1 if INTERLEAVED else r + HALF
    a = tl.load(x_row + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_row + second, mask=mask, other=0.0).to(tl.float32)
    dtype = out_row.dtype.element_ty
    tl.store(out_row + first, (a * cos - b * sin).to(dtype), mask=mask)
    tl.store(out_row + second, (a * sin + b * cos).to(dtype), mask=mask)


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    stride_t,
    stride_h,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotate HEADS heads of a token."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    r = tl.arange(0, HALF_PAD)
    is_r = r < HALF
    mask = (h < H)[:, None] & is_r[None, :]
    cos = tl.load(cos_ptr + t * HALF + r, mask=is_r, other=0.0)[None, :]
    sin = tl.load(sin_ptr + t * HALF + r, mask=is_r, other=0.0)[None, :]
    row = x_ptr + t * stride_t + (h * stride_h)[:, None]
    rotate_pairs(
        x_row=row,
        out_row=row,
        r=r[None, :],
        mask=mask,
        cos=cos,
        sin=sin,
        HALF=HALF,
        INTERLEAVED=INTERLEAVED,
    )


def _launch_rotate(x_THR: Tensor, rotation: Rotation) -> None:
    """Launch a program per token and block of heads."""
    T, H, R = x_THR.shape
    assert x_THR.stride(2) == 1, f"{x_THR.stride()=}"
    rotation.check_contiguous()
    half = R // 2
    if T:
        _rotate_kernel[(T, cdiv(H, _HEADS))](
            x_ptr=x_THR,
            cos_ptr=rotation.cos_Tr,
            sin_ptr=rotation.sin_Tr,
            stride_t=x_THR.stride(0),
            stride_h=x_THR.stride(1),
            H=H,
            HALF=half,
            HALF_PAD=next_power_of_2(half),
            HEADS=_HEADS,
            INTERLEAVED=rotation.interleaved,
            num_warps=2,
            **launch_options(),
        )


@operation(kernel=_launch_rotate)
def rotate(x_THR: Tensor, rotation: Rotation) -> None:
    """Do `apply_rope` in place.

    Args:
        x_THR: [T, H, R], any float dtype; heads and tokens may be strided.
        rotation: of the tokens.
    """
    x_THR.copy_(apply_rope(x_THR, rotation))
