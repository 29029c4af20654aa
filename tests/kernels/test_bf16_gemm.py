"""The product of few bfloat16 rows against the float32 product, in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels import linear, make_locks, operation
from dsv3_kernels.gemm._split_k import splits_of
from dsv3_kernels.gemm.bf16_gemm import FEW_ROWS, bf16_gemm
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

BF16 = torch.bfloat16


def matrices(M: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(M + N + K)
    return torch.randn(M, K).to(BF16), (torch.randn(N, K) / K**0.5).to(BF16)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        *((1, 576, 512), (2, 3, 5), (3, 100, 2000), (16, 64, 64), (17, 320, 200)),
        *((31, 72, 1025), (33, 65, 1024), (64, 100, 2048), (65, 100, 640)),
    ],
)
def test_few_rows(M: int, N: int, K: int, locked: bool) -> None:
    x, w = matrices(M, N, K)
    locks = make_locks(w) if locked else None
    got = bf16_gemm.kernel(x, w, torch.float32, locks)
    assert_close("y", got, bf16_gemm.reference(x, w, torch.float32), 1e-5)
    assert_close("bf16", bf16_gemm.kernel(x, w, BF16, locks), bf16_gemm.reference(x, w), 2**-7)
    if locks is not None:  # left as they were found, for the next launch
        assert not locks.any()
        assert_bitwise_equal("again", bf16_gemm.kernel(x, w, torch.float32, locks), got)
        assert_bitwise_equal("unlocked", bf16_gemm.kernel(x, w, torch.float32), got)


def test_definition() -> None:
    x, w = matrices(5, 70, 300)
    want = x.double() @ w.double().T
    assert_close("fp32", bf16_gemm.reference(x, w, torch.float32), want, 1e-6)
    assert_close("bf16", bf16_gemm.reference(x, w), want, 2**-8)


def test_rows_do_not_see_each_other() -> None:
    """Sums of 64 products of integers are exact in any order; those of splits, times a power
    of two for each, are not: their order counts and must not change.
    """
    torch.manual_seed(0)
    K = 2048
    assert splits_of(100, K // 64) == 8
    scale = 2.0 ** torch.randint(-20, 21, (K // 64,)).repeat_interleave(64)
    x = (torch.randint(-8, 9, (65, K)) * scale).to(BF16)
    w = torch.randint(-8, 9, (100, K)).to(BF16)
    whole = bf16_gemm.kernel(x, w, torch.float32)
    assert not torch.equal(whole, x.float() @ w.float().T)
    for rows in (slice(0, 1), slice(37, 40), slice(5, 22), slice(0, 64)):
        for locks in (None, make_locks(w)):
            got = bf16_gemm.kernel(x[rows], w, torch.float32, locks)
            assert_bitwise_equal(f"{rows}", got, whole[rows])


def test_rows_of_a_wider_tensor() -> None:
    """Memory beside the columns and behind the rows is not read."""
    x, w = matrices(3, 70, 200)
    wide = torch.full((4, 264), torch.nan, dtype=BF16)
    wide[:3, :200] = x
    got = bf16_gemm.kernel(wide[:3, :200], w, torch.float32)
    assert_bitwise_equal("strided", got, bf16_gemm.kernel(x, w, torch.float32))
    columns = x.t().contiguous().t()
    assert_bitwise_equal("columns", bf16_gemm.kernel(columns, w, torch.float32), got)


def test_what_is_not_ours_is_left_to_torch() -> None:
    for dtype in (BF16, torch.float32):
        x, w = (t.to(dtype) for t in matrices(4, 30, 50))
        assert_bitwise_equal("y", linear(x, w), F.linear(x, w))
        assert linear(x, w, torch.float32).dtype == torch.float32
        assert linear(x[:0], w).shape == (0, 30) and linear(x, w[:0]).shape == (4, 0)
        assert not linear(x[:, :0], w[:, :0]).any()


def test_few_rows_are_ours_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = bf16_gemm.kernel

    def ours(x: Tensor, *args: Any) -> Tensor:
        calls.append(len(x))
        return kernel(x, *args)

    monkeypatch.setattr(operation, "use_triton", lambda w: True)
    monkeypatch.setattr(bf16_gemm, "kernel", ours)
    x, w = matrices(FEW_ROWS + 1, 30, 130)
    locks = make_locks(w)
    for M in (0, 1, FEW_ROWS, FEW_ROWS + 1):
        y = linear(x[:M], w, None, locks)
        assert_close(f"{M} rows", y, bf16_gemm.reference(x[:M], w), 2**-7)
    assert linear(x[:2], w, torch.float32).dtype == torch.float32
    linear(x[:2].float(), w.float())
    linear(x[:2, :0], w[:, :0])
    assert calls == [1, FEW_ROWS, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("N", "K"), [(2112, 7168), (16160, 7168), (512, 7168), (100, 1000)])
def test_on_a_gpu(N: int, K: int) -> None:
    """A row has the same bits among few rows. Run with TRITON_INTERPRET=0."""
    x, w = (t.cuda() for t in matrices(300, N, K))
    want = bf16_gemm.reference(x, w, torch.float32)
    rows: dict[bool, Tensor] = {}
    locks = make_locks(w)
    for M in (1, 8, 16, 17, 64, 65, 300):
        got = linear(x[:M], w, torch.float32, locks)
        assert got.dtype == torch.float32
        assert_close(f"{M} rows", got, want[:M], 1e-4)
        first = rows.setdefault(M <= FEW_ROWS, got[:1])
        if M <= FEW_ROWS:
            assert_bitwise_equal(f"first of {M}", got[:1], first)
        assert_close(f"{M} rows, bf16", linear(x[:M], w, None, locks), want[:M], 2**-7)
