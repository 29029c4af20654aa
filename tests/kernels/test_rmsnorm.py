import pytest
import torch

from dsv3_kernels import rmsnorm
from dsv3_kernels.testing import assert_bitwise_equal, assert_close


@pytest.mark.parametrize("shape", [(1, 7), (63, 1536), (129, 512), (3, 5, 64)])
def test_rmsnorm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape) * 3, torch.randn(shape[-1])
    x[0] *= 1e-4  # where eps counts
    x64 = x.double()
    want = w.double() * x64 / (x64.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-6).sqrt()
    got = rmsnorm(x, w, 1e-6)
    assert got.dtype == torch.float32
    assert_close("rmsnorm", got, want, 1e-6)
    assert_close("small row", got[0], want[0], 1e-6)


def test_bfloat16_is_rounded_once() -> None:
    torch.manual_seed(1)
    x, w = torch.randn(129, 512).bfloat16(), torch.randn(512)
    assert_bitwise_equal("bf16", rmsnorm(x, w, 1e-6), rmsnorm(x.float(), w, 1e-6).bfloat16())


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(2)
    x, w = torch.randn(130, 384), torch.randn(384)
    assert_bitwise_equal("slice", rmsnorm(x[17:19], w, 1e-6), rmsnorm(x, w, 1e-6)[17:19])
