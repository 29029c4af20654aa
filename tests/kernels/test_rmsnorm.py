import pytest
import torch

from dsv3_kernels import act_quant, add_rmsnorm, rmsnorm
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


def test_add_and_quantize() -> None:
    torch.manual_seed(3)
    x, y, w = torch.randn(5, 256), torch.randn(5, 256), torch.randn(256)
    total, h, q = add_rmsnorm(x, y, w, 1e-6, quant=True)
    assert_bitwise_equal("sum", total, x + y)
    assert_bitwise_equal("norm", h, rmsnorm(x + y, w, 1e-6))
    assert q is not None
    assert_bitwise_equal("q", q.q, act_quant(h).q)
    assert_bitwise_equal("scale", q.scale, act_quant(h).scale)
    assert add_rmsnorm(x, None, w, 1e-6)[2] is None
    _, h, q = add_rmsnorm(x.bfloat16(), None, w, 1e-6, quant=True, ue8m0=True)
    assert q is not None and h.dtype == torch.bfloat16
    assert_bitwise_equal("of the rounded values", q.scale, act_quant(h, ue8m0=True).scale)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1536), (3, 5, 64), (2, 7168)])
@pytest.mark.parametrize("add", [False, True])
def test_triton(shape: tuple[int, ...], add: bool) -> None:
    torch.manual_seed(4)
    x, w = torch.randn(shape) * 3, torch.randn(shape[-1])
    x[0] *= 1e-4
    y = torch.randn(shape) if add else None
    quant = shape[-1] % 128 == 0
    for ue8m0 in (False, True):
        got = add_rmsnorm.kernel(x, y, w, 1e-6, quant, ue8m0)
        want = add_rmsnorm.reference(x, y, w, 1e-6, quant, ue8m0)
        assert_bitwise_equal("sum", got[0], want[0])
        assert_close("norm", got[1], want[1], 1e-6)
        assert (got[2] is not None) == quant
        if got[2] is not None:
            again = act_quant.reference(got[1], ue8m0)
            assert_bitwise_equal("q", got[2].q, again.q)
            assert_bitwise_equal("scale", got[2].scale, again.scale)


def test_triton_takes_any_dtype_and_rows_apart() -> None:
    torch.manual_seed(5)
    wide, w = torch.randn(9, 700).bfloat16(), torch.randn(384)
    x, y = wide[:, 100:484], torch.randn(9, 384)
    total, h, _ = add_rmsnorm.kernel(x, y, w, 1e-6)
    want = add_rmsnorm.reference(x, y, w, 1e-6)
    assert total.dtype == h.dtype == torch.bfloat16
    # The interpreter rounds to bfloat16 wrongly, by one unit in the last place.
    assert_close("sum", total, want[0], 2**-7)
    assert_close("norm", h, want[1], 2**-6)
    got = add_rmsnorm.kernel(wide.float()[:, 100:484], None, w, 1e-6)[1]
    assert_close("strided", got, rmsnorm(wide.float()[:, 100:484], w, 1e-6), 1e-6)
    assert add_rmsnorm.kernel(x[:0], y[:0], w, 1e-6)[1].shape == (0, 384)


def test_triton_rows_do_not_see_each_other() -> None:
    torch.manual_seed(6)
    x, y, w = torch.randn(40, 384), torch.randn(40, 384), torch.randn(384)
    whole = add_rmsnorm.kernel(x, y, w, 1e-6, True)
    part = add_rmsnorm.kernel(x[17:19], y[17:19], w, 1e-6, True)
    assert_bitwise_equal("slice", part[1], whole[1][17:19])
    assert part[2] is not None and whole[2] is not None
    assert_bitwise_equal("q", part[2].q, whole[2].q[17:19])
