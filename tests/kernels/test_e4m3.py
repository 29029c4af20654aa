"""All 256 bytes, and every kind of rounding, as torch has them."""

import torch

from dsv3_kernels._triton import tl, triton
from dsv3_kernels.gemm._e4m3 import decode_e4m3, e4m3_operand, e4m3_view, encode_e4m3
from dsv3_kernels.testing import assert_bitwise_equal

FP8 = torch.float8_e4m3fn


@triton.jit
def _decode(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, decode_e4m3(tl.load(x_ptr + at)))


@triton.jit
def _encode(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, encode_e4m3(tl.load(x_ptr + at), False))


@triton.jit
def _load(x_ptr, y_ptr, N: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < 200, other=0.0 if NATIVE else 0)
    tl.store(y_ptr + at, e4m3_operand(x, NATIVE).to(tl.float32))


def test_every_byte() -> None:
    codes = torch.arange(256).to(torch.uint8)
    want = codes.view(FP8).float()
    got = torch.empty(256)
    _decode[(1,)](codes, got, 256)
    assert got.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    number = ~want.isnan()
    assert_bitwise_equal("decoded", got[number], want[number])
    for native in (False, True):
        _load[(1,)](codes.view(FP8) if native else e4m3_view(codes.view(FP8)), got, 256, native)
        # The interpreter's own conversion knows no NaN.
        assert torch.equal(got[:127], want[:127]) and torch.equal(got[128:200], want[128:200])
        assert not got[200:].any()


def test_rounding() -> None:
    torch.manual_seed(0)
    codes = torch.arange(256).to(torch.uint8).view(FP8).float()
    values = codes[~codes.isnan()].unique()
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat((values, middle))
    x = torch.cat(
        (
            near,
            near * (1 + 2**-23),
            near * (1 - 2**-23),
            torch.tensor([0.0, -0.0, 463.9, -463.9, 448.0, float("nan"), 1e-30, -1e-42]),
            torch.randn(1000) * torch.logspace(-5, 2, 1000).clamp_max(80),
        )
    ).clamp(-464, 464)
    x = torch.nn.functional.pad(x, (0, 4096 - len(x)))
    got = torch.empty(4096, dtype=torch.uint8)
    _encode[(1,)](x, got, 4096)
    want = x.to(FP8).view(torch.uint8)
    number = ~x.isnan()
    assert_bitwise_equal("encoded", got[number], want[number])
    assert (got[~number] & 0x7F == 0x7F).all() and not number.all()
