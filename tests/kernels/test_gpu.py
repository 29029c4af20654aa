"""The small kernels on a real GPU (TRITON_INTERPRET=0): the bits of the references on a CPU."""

import pytest
import torch

from dsv3_kernels import act_quant, add_rmsnorm, rmsnorm, silu_mul, silu_mul_quant, weight_dequant
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def check_quantized(name: str, got: Quantized, x: torch.Tensor, ue8m0: bool) -> None:
    want = act_quant.reference(x.cpu(), ue8m0)
    assert_bitwise_equal(f"{name}: scale", got.scale.cpu(), want.scale)
    assert_bitwise_equal(f"{name}: q", got.q.cpu(), want.q)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 4097])
def test_quantization_alone_and_fused(rows: int, ue8m0: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(rows, 7168) * torch.randn(rows, 1).exp() * 3).bfloat16()
    x[0, :128] = 0
    y, weight = torch.randn(rows, 7168), torch.randn(7168)
    check_quantized("act_quant", act_quant(x.cuda(), ue8m0), x, ue8m0)
    total, h, q = add_rmsnorm(x.cuda(), y.cuda(), weight.cuda(), 1e-6, True, ue8m0)
    assert_bitwise_equal("sum", total.cpu(), (x.float() + y).bfloat16())
    assert_close("norm", h.cpu(), rmsnorm(total.cpu(), weight, 1e-6), 2**-7)
    assert q is not None
    check_quantized("add_rmsnorm", q, h, ue8m0)
    act = silu_mul(x.cuda())
    assert_close("silu_mul", act.cpu(), silu_mul(x), 2**-7)
    check_quantized("silu_mul", silu_mul_quant(x.cuda(), ue8m0), act, ue8m0)


def test_dequantization() -> None:
    torch.manual_seed(1)
    w = (torch.randn(2, 576, 1536) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 5, 12)
    got = weight_dequant(w.cuda(), scale.cuda(), torch.bfloat16)
    assert_bitwise_equal("whole", got.cpu(), weight_dequant(w, scale, torch.bfloat16))
    part, covering = w[0, 100:300, 60:1000], scale[0, :3, :8]
    got = weight_dequant(part.cuda(), covering.cuda(), torch.float32, 100, 60)
    assert_bitwise_equal("part", got.cpu(), weight_dequant(part, covering, torch.float32, 100, 60))
