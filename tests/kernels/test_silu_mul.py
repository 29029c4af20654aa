import torch

from dsv3_kernels import silu_mul
from dsv3_kernels.testing import assert_bitwise_equal, assert_close


def test_silu_mul() -> None:
    torch.manual_seed(0)
    x = torch.randn(63, 2 * 40) * 8
    gate, up = x[:, :40].double(), x[:, 40:].double()
    assert_close("silu_mul", silu_mul(x), gate / (1 + torch.exp(-gate)) * up, 1e-6)
    half = x.bfloat16()
    assert_bitwise_equal("bf16", silu_mul(half), silu_mul(half.float()).bfloat16())
    assert silu_mul(x[:0]).shape == (0, 40)
