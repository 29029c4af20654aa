import pytest
import torch

from dsv3_kernels import act_quant, silu_mul, silu_mul_quant
from dsv3_kernels.testing import assert_bitwise_equal, assert_close


def test_silu_mul() -> None:
    torch.manual_seed(0)
    x = torch.randn(63, 2 * 40) * 8
    gate, up = x[:, :40].double(), x[:, 40:].double()
    assert_close("silu_mul", silu_mul(x), gate / (1 + torch.exp(-gate)) * up, 1e-6)
    half = x.bfloat16()
    assert_bitwise_equal("bf16", silu_mul(half), silu_mul(half.float()).bfloat16())
    assert silu_mul(x[:0]).shape == (0, 40)


def test_silu_mul_quant() -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 2 * 256).bfloat16()
    got, want = silu_mul_quant(x, ue8m0=True), act_quant(silu_mul(x), ue8m0=True)
    assert_bitwise_equal("q", got.q, want.q)
    assert_bitwise_equal("scale", got.scale, want.scale)


@pytest.mark.parametrize("shape", [(1, 256), (3, 40), (5, 1408), (2, 3, 128)])
def test_triton(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = torch.randn(*shape[:-1], 2 * shape[-1]) * 8
    y = silu_mul.kernel(x)
    assert_close("silu_mul", y, silu_mul(x), 1e-6)
    assert_close("bf16", silu_mul.kernel(x.bfloat16()), silu_mul(x.bfloat16()), 2**-7)
    assert silu_mul.kernel(x[:0]).shape == (0, *shape[1:])
    if shape[-1] % 128 == 0:
        for ue8m0 in (False, True):
            got, want = silu_mul_quant.kernel(x, ue8m0), act_quant.reference(y, ue8m0)
            assert_bitwise_equal("q", got.q, want.q)
            assert_bitwise_equal("scale", got.scale, want.scale)
        part = silu_mul_quant.kernel(x[-1:])
        assert_bitwise_equal("slice", part.q, silu_mul_quant.kernel(x).q[-1:])
