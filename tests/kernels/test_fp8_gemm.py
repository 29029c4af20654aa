"""Both forms against the product of the dequantized matrices, in the interpreter."""

import sys

import pytest
import torch
from torch import Tensor

from dsv3_kernels import Quantized, act_quant, fp8_gemm, make_locks, weight_dequant
from dsv3_kernels.gemm._split_k import splits_of
from dsv3_kernels.gemm.fp8_gemm import OLD_TILES, TILES, Tile, is_small, launch_large, tile_of
from dsv3_kernels.testing import assert_bitwise_equal, assert_close


def matrices(M: int, N: int, K: int) -> tuple[Quantized, Tensor, Tensor]:
    """Blocks of clearly different magnitude: a wrong scale is seen."""
    torch.manual_seed(M + N + K)
    x = act_quant(torch.randn(M, K) * torch.randn(M, K // 128).exp().repeat_interleave(128, 1))
    w = (torch.randn(N, K) * 20).to(torch.float8_e4m3fn)
    return x, w, torch.randn(-(-N // 128), K // 128).exp() / 20


def large(x: Quantized, w: Tensor, scale: Tensor, tile: Tile, tma: bool) -> Tensor:
    y = torch.empty(len(x.q), len(w))
    launch_large(x, w, scale, y, tile, tma)
    return y


def test_definition() -> None:
    x, w, scale = matrices(5, 200, 256)
    x64 = x.q.double() * x.scale.double().repeat_interleave(128, 1)
    want = x64 @ weight_dequant(w, scale, torch.float32).double().T
    assert_close("fp32", fp8_gemm(x, w, scale, torch.float32), want, 1e-6)
    assert_close("bf16", fp8_gemm(x, w, scale), want, 2**-8)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        *((1, 576, 1024), (3, 100, 2048), (16, 64, 128), (31, 320, 256)),
        *((63, 100, 1152), (128, 70, 1024), (129, 72, 1024)),
    ],
)
def test_few_rows(M: int, N: int, K: int, locked: bool) -> None:
    x, w, scale = matrices(M, N, K)
    locks = make_locks(w) if locked else None
    got = fp8_gemm.kernel(x, w, scale, torch.float32, locks)
    assert_close("y", got, fp8_gemm.reference(x, w, scale, torch.float32), 1e-5)
    if locks is not None:  # left as they were found, for the next launch
        assert not locks.any()
        assert_bitwise_equal("again", fp8_gemm.kernel(x, w, scale, torch.float32, locks), got)
        assert_bitwise_equal("unlocked", fp8_gemm.kernel(x, w, scale, torch.float32), got)


@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 576, 256), (63, 100, 128), (129, 350, 384), (65, 640, 128)]
)
@pytest.mark.parametrize("tile", [*TILES, *OLD_TILES])
def test_many_rows(M: int, N: int, K: int, tile: Tile) -> None:
    x, w, scale = matrices(M, N, K)
    pointers = large(x, w, scale, tile, tma=False)
    assert_close("y", pointers, fp8_gemm.reference(x, w, scale, torch.float32), 1e-5)
    if tile in TILES:
        assert_bitwise_equal("descriptors", large(x, w, scale, tile, tma=True), pointers)


@pytest.mark.parametrize("M", [17, 128])
def test_native_operands(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs whose e4m3 Triton knows, the interpreter multiplies e4m3 itself."""
    x, w, scale = matrices(M, 200, 1024)
    few, many = (fp8_gemm.kernel(x, w, scale, torch.float32), large(x, w, scale, TILES[0], True))
    for module in (
        sys.modules["dsv3_kernels.gemm._e4m3"],
        sys.modules["dsv3_kernels.gemm.fp8_gemm"],
    ):
        monkeypatch.setattr(module, "is_native", lambda x: True)
    # Tiles of 128 rows are then taken, whose blocks numpy adds in another order.
    assert_close("few", fp8_gemm.kernel(x, w, scale, torch.float32), few, 1e-6)
    assert_bitwise_equal("many", large(x, w, scale, TILES[0], True), many)


def test_tiles_in_groups() -> None:
    """More tiles of rows than a group has, and a last group that is not full."""
    x, w, scale = matrices(64 * 10 - 5, 200, 128)
    got = large(x, w, scale, TILES[-1], tma=False)
    assert_close("y", got, fp8_gemm.reference(x, w, scale, torch.float32), 1e-5)


def test_rows_do_not_see_each_other() -> None:
    """Products inside a block of integers are exact, in whatever order numpy adds them; the scaled
    additions of blocks and splits, which are ours, are not.
    """
    torch.manual_seed(0)
    q = torch.randint(-8, 9, (129, 1024)).to(torch.float8_e4m3fn)
    w = torch.randint(-8, 9, (100, 1024)).to(torch.float8_e4m3fn)
    x, scale = Quantized(q, torch.rand(129, 8)), torch.rand(1, 8)
    few = fp8_gemm.kernel(x, w, scale, torch.float32)
    many = large(x, w, scale, TILES[0], tma=False)
    assert not torch.equal(few, many)  # the order counts
    for rows in (slice(0, 1), slice(37, 40), slice(0, 64)):
        part = Quantized(x.q[rows], x.scale[rows])
        for locks in (None, make_locks(w)):
            got = fp8_gemm.kernel(part, w, scale, torch.float32, locks)
            assert_bitwise_equal("few", got, few[rows])
        for tile in TILES:
            assert_bitwise_equal("many", large(part, w, scale, tile, tma=False), many[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("N", "K"), [(2112, 7168), (7168, 2048), (512, 7168), (100, 1024)])
def test_on_a_gpu(N: int, K: int) -> None:
    """A row has the same bits however many there are. Run with TRITON_INTERPRET=0."""
    x_host, w_host, scale_host = matrices(2051, N, K)
    x = Quantized(x_host.q.cuda(), x_host.scale.cuda())
    w, scale = w_host.cuda(), scale_host.cuda()
    want = fp8_gemm.reference(x, w, scale, torch.float32)
    rows: dict[bool, Tensor] = {}
    for M in (1, 8, 16, 17, 64, 128, 256, 1024, 2051):
        part, locks = Quantized(x.q[:M], x.scale[:M]), make_locks(w)
        got = fp8_gemm(part, w, scale, torch.float32, locks)
        # Hopper keeps 14 bits of every product's sum inside a block: 4 additions, each cut off by
        # 2**-13 of the largest operand, are 5e-4 of a sum as large. Unmeasured: four times that.
        assert_close(f"{M} rows", got, want[:M], 2e-3)
        first = rows.setdefault(is_small(M, N), got[:1])
        assert_bitwise_equal(f"first of {M}", got[:1], first)


def test_shapes() -> None:
    x, w, scale = matrices(6, 100, 256)
    y = fp8_gemm.kernel(x, w, scale)
    assert y.dtype == torch.bfloat16
    stacked = Quantized(x.q.view(2, 3, 256), x.scale.view(2, 3, 2))
    assert_bitwise_equal("leading", fp8_gemm.kernel(stacked, w, scale), y.view(2, 3, 100))
    empty = Quantized(x.q[:0], x.scale[:0])
    assert fp8_gemm.kernel(empty, w, scale).shape == fp8_gemm(empty, w, scale).shape == (0, 100)


def test_forms_of_published_shapes() -> None:
    """Splits fill the GPU, whatever M; decode and prefill take the forms meant for them."""
    shapes = ((2112, 7168), (24576, 1536), (7168, 16384), (512, 7168), (7168, 256), (3072, 1536))
    for N, K in shapes:
        programs = -(-N // 64) * splits_of(N, K // 128)
        assert 100 <= programs <= 400
        assert is_small(1, N) and is_small(128, N) and not is_small(2048, N)
    assert tile_of(4096, 24576) == tile_of(1024, 4096) == TILES[0]
    assert tile_of(1024, 3072) == TILES[1]  # 128 programs, not 96 or 192
    assert tile_of(4096, 2112) == TILES[1]
    assert tile_of(256, 7168) == TILES[2]  # 112 programs, not 56
    assert tile_of(256, 3072) == TILES[3]
