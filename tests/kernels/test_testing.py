"""The comparisons that the other tests rely on can fail."""

import pytest
import torch

from dsv3_kernels.testing import assert_bitwise_equal, assert_close

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([1.0, 2.0], [1.0, 2.1]),
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, INF], [1.0, NAN]),
        ([1.0], [1.0, 1.0]),
        ([1e-3], [0.0]),
    ],
)
def test_assert_close_fails(got: list[float], want: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"^name"):
        assert_close("name", torch.tensor(got), torch.tensor(want), 1e-4)


def test_assert_close_passes() -> None:
    a = torch.tensor([[1.0, INF, NAN, -INF]])
    assert_close("same", a, a, 0.0)
    assert_close("near", torch.tensor([100.0, 0.001]), torch.tensor([100.0, 0.0]), 1e-4)
    assert_close("empty", torch.zeros(0, 3), torch.zeros(0, 3), 0.0)


def test_the_message_says_where() -> None:
    want = torch.zeros(3, 4)
    want[0, 0] = 10.0
    got = want.clone()
    got[2, 1] = 1.0
    with pytest.raises(AssertionError, match=r"at \[2, 1\] \(got 1, want 0\)"):
        assert_close("x", got, want, 1e-3)


def test_bitwise() -> None:
    zero = torch.tensor([0.0])
    assert_bitwise_equal("nan", torch.tensor([NAN]), torch.tensor([NAN]))
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_bitwise_equal("sign", zero, -zero)
    with pytest.raises(AssertionError, match="float64"):
        assert_bitwise_equal("dtype", zero.double(), zero)
