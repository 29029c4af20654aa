from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_kernels import Rotation, apply_rope
from dsv3_kernels.attention.absorb_query import absorb_query
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

Op = Callable[..., Any]  # an operation or one of its implementations


def operands(
    T: int,
    H: int,
    N: int,
    C: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor, Rotation]:
    """Queries that stand in wider rows, W_UK as rows of a matrix that W_UV shares, and angles."""
    torch.manual_seed(0)
    q = torch.randn(T, H * (N + R) + 5).to(dtype)[:, 5:].unflatten(1, (H, N + R))
    w = torch.randn(H, N + 3, C).to(dtype)[:, :N]
    angle = torch.rand(T, R // 2) * 50
    return q, w, Rotation(angle.cos(), angle.sin(), interleaved)


@pytest.mark.parametrize("absorb", [absorb_query.reference, absorb_query.kernel])
@pytest.mark.parametrize("interleaved", [True, False])
def test_definition(absorb: Op, interleaved: bool) -> None:
    q, w, rotation = operands(3, 2, 8, 16, 4, interleaved=interleaved)
    got = absorb(q, w, rotation)
    assert got.shape == (3, 2, 20)
    for h in range(2):
        assert_close("absorbed", got[:, h, :16], q[:, h, :8].double() @ w[h].double(), 1e-6)
        rotated = apply_rope(q[:, h, 8:], rotation)
        assert_close("rotated", got[:, h, 16:], rotated, 1e-6)


@pytest.mark.parametrize(
    "shape", [(1, 3, 128, 512, 64), (17, 2, 24, 72, 12), (0, 2, 16, 16, 4), (33, 1, 100, 65, 6)]
)
def test_kernel(shape: tuple[int, int, int, int, int]) -> None:
    args = operands(*shape)
    got = absorb_query.kernel(*args)
    assert got.shape == (*shape[:2], shape[3] + shape[4])
    if got.numel():
        assert_close("queries", got, absorb_query.reference(*args), 1e-5)


def test_bfloat16_is_rounded_once() -> None:
    q, w, rotation = operands(5, 2, 32, 64, 8, torch.bfloat16, interleaved=False)
    exact = absorb_query.reference(q.float(), w.float(), rotation)
    assert_close("queries", absorb_query.kernel(q, w, rotation).float(), exact, 2**-7)


def test_a_token_does_not_depend_on_the_others() -> None:
    q, w, rotation = operands(40, 2, 16, 32, 8)
    whole = absorb_query.kernel(q, w, rotation)
    for t in (0, 16, 32):  # first rows of a tile: the interpreter sums others in another order
        one = slice(t, t + 1)
        alone = absorb_query.kernel(q[one], w, rotation.tokens(t, t + 1))
        assert_bitwise_equal("alone", alone, whole[one])
