from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_kernels import Rotation, apply_rope
from dsv3_kernels.attention.rope import rotate
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

Op = Callable[..., Any]  # an operation or one of its implementations


def rotated(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Turn the plane of every pair: multiply by exp(i angle)."""
    half = x.shape[-1] // 2
    first = range(0, 2 * half, 2) if interleaved else range(half)
    second = [i + 1 for i in first] if interleaved else [i + half for i in first]
    turned = torch.complex(x[..., list(first)].double(), x[..., second].double())
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    out = torch.empty(x.shape, dtype=torch.float64)
    out[..., list(first)], out[..., second] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads", [None, 1, 5])
def test_rope(interleaved: bool, heads: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 16) if heads is None else torch.randn(9, heads, 16)
    angle = torch.rand(9, 8, dtype=torch.float64) * 50
    shown = angle if heads is None else angle[:, None]
    rotation = Rotation(angle.cos().float(), angle.sin().float(), interleaved)
    got = apply_rope(x, rotation)
    assert_close("rope", got, rotated(x, shown, interleaved), 1e-6)
    half = apply_rope(x.bfloat16(), rotation)
    assert half.dtype == torch.bfloat16
    want = apply_rope(x.bfloat16().float(), rotation).bfloat16()
    assert_bitwise_equal("bf16", half, want)


def test_scores_depend_on_distance_only() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 16)
    frequency = 1.0 / 100.0 ** (torch.arange(8) / 8)

    def score(at: int, key_at: int) -> Tensor:
        angles = torch.tensor([[at], [key_at]]) * frequency
        rotation = Rotation(angles.cos(), angles.sin(), True)
        return (apply_rope(q, rotation.tokens(0, 1)) * apply_rope(k, rotation.tokens(1))).sum()

    assert_close("shifted", score(105, 101), score(7, 3), 1e-5)
    assert abs(score(105, 101) - score(105, 100)) > 1e-3


@pytest.mark.parametrize("rotate", [rotate.reference, rotate.kernel])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 20, 8), (3, 16, 64), (2, 3, 12)])
def test_in_place(rotate: Op, interleaved: bool, shape: tuple[int, int, int]) -> None:
    """The last part of longer rows; the part before it stays."""
    torch.manual_seed(2)
    (T, H, R), angle = shape, torch.rand(shape[0], shape[2] // 2) * 50
    x = torch.randn(T, H, R + 6)
    rotation = Rotation(angle.cos(), angle.sin(), interleaved)
    want = apply_rope(x[..., 6:], rotation)
    before = x.clone()
    rotate(x[..., 6:], rotation)
    assert_bitwise_equal("the rest", x[..., :6], before[..., :6])
    assert_close("rotated", x[..., 6:], want, 1e-6)
