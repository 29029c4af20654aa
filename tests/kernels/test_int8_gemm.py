import pytest
import torch

from dsv3_kernels import Quantized, int8_gemm, int8_quant
from dsv3_kernels.gemm.fp8_gemm import OLD_TILES, TILES, Tile, launch_large
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.test_integers import matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (3, 200), (2, 3, 1024), (70, 7), (0, 64)])
def test_quantization(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).mul(10).to(dtype)
    if x.numel():
        x.view(-1, shape[-1])[0] = 0
    got, want = int8_quant.kernel(x), int8_quant.reference(x)
    assert got.q.shape == shape and got.scale.shape == (*shape[:-1], 1)
    assert_bitwise_equal("q", got.q, want.q)
    assert_bitwise_equal("scale", got.scale, want.scale)
    assert (got.q * got.scale - x).abs().le(got.scale / 2 * 1.001).all()


def test_ties_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    for quant in (int8_quant.kernel, int8_quant.reference):
        assert quant(x).q.tolist() == [[127, -127, 0, 2, 2, 0, -2, -2]]


def whole_numbers(rows: int, cols: int) -> Quantized:
    q = torch.randint(-127, 128, (rows, cols)).to(torch.int8)
    return Quantized(q, torch.rand(rows, 1) + 0.5)


@pytest.mark.parametrize("rows", [1, 3, 17, 70, 300])
@pytest.mark.parametrize(("features", "cols"), [(70, 128), (200, 384), (5, 1024)])
def test_products(rows: int, features: int, cols: int) -> None:
    torch.manual_seed(rows)
    x, w = whole_numbers(rows, cols), matrix(8, features, cols, 0)
    got = int8_gemm.kernel(x, w, torch.float32)
    sums = x.q.double() @ w.q.double().T
    assert_close("y", got, sums * x.scale * w.scale.double().T, 1e-6)
    assert_close("reference", int8_gemm.reference(x, w, torch.float32), got, 1e-5)
    assert_close("bf16", int8_gemm.kernel(x, w, torch.bfloat16), got, 2**-7)


@pytest.mark.parametrize("tile", [*TILES, *OLD_TILES], ids=str)
@pytest.mark.parametrize("tma", [False, True])
def test_every_tile_gives_the_same_bits(tile: Tile, tma: bool) -> None:
    torch.manual_seed(1)
    x, w = whole_numbers(150, 256), matrix(8, 330, 256, 0)
    want = int8_gemm.kernel(x, w, torch.float32)
    got = torch.empty_like(want)
    launch_large(x, w.q, w.scale, got, tile, tma)
    assert_bitwise_equal("y", got, want)


def test_nothing_to_do() -> None:
    w = matrix(8, 16, 128, 0)
    assert int8_gemm.kernel(whole_numbers(0, 128), w, torch.bfloat16).shape == (0, 16)
