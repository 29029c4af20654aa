"""Products with matrices of integers: torch's on CPUs, and the kernels in the interpreter."""

import pytest
import torch
from torch import Tensor

from dsv3_kernels import (
    Integers,
    cpu_product,
    has_cpu_product,
    int_dequant,
    int_gemm,
    make_locks,
    pack_for_cpu,
)
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

BF16 = torch.bfloat16


def matrix(bits: int, rows: int, cols: int, group: int, scale: torch.dtype = BF16) -> Integers:
    """Return a random matrix; a group of 0 is a whole row."""
    torch.manual_seed(rows + cols)
    group = group or cols
    scales = torch.rand(rows, cols // group).add(0.5).mul(cols**-0.5 / 8).to(BF16).to(scale)
    if bits == 8:
        return Integers(torch.randint(-128, 128, (rows, cols)).to(torch.int8), scales, group)
    return Integers(torch.randint(0, 256, (rows, cols // 2)).to(torch.uint8), scales, group)


def values(w: Integers) -> Tensor:
    """Return the matrix in float64, value by value."""
    rows, cols = w.shape
    out = torch.empty(rows, cols, dtype=torch.float64)
    for n in range(rows):
        for k in range(cols):
            if w.bits == 8:
                q = int(w.q[n, k])
            else:
                zero = 8 if w.zero is None else int(w.zero[n, k // w.group])
                q = (int(w.q[n, k // 2]) >> (4 * (k % 2)) & 15) - zero
            out[n, k] = q * float(w.scale[n, k // w.group])
    return out


SHAPES = [(8, 16, 64, 0), (4, 16, 64, 32), (4, 48, 128, 64), (8, 5, 100, 0), (4, 7, 96, 32)]


@pytest.mark.parametrize(("bits", "rows", "cols", "group"), SHAPES)
def test_dequantization(bits: int, rows: int, cols: int, group: int) -> None:
    w = matrix(bits, rows, cols, group)
    want = values(w).float()
    assert_bitwise_equal("reference", int_dequant.reference(w, torch.float32), want)
    assert_bitwise_equal("kernel", int_dequant.kernel(w, torch.float32), want)
    stacked = Integers(torch.stack((w.q, w.q)), torch.stack((w.scale, 2 * w.scale)), w.group)
    for dequant in (int_dequant.reference, int_dequant.kernel):
        assert_bitwise_equal(
            "stack", dequant(stacked, torch.float32), torch.stack((want, 2 * want))
        )


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("T", [0, 1, 3, 8, 9, 40, 161])
@pytest.mark.parametrize(
    ("bits", "rows", "cols", "group"),
    [(8, 7, 32, 0), (8, 64, 96, 0), (4, 16, 64, 32), (4, 80, 256, 128), (4, 320, 64, 32)],
)
def test_products_of_a_cpu(
    bits: int, rows: int, cols: int, group: int, T: int, dtype: torch.dtype
) -> None:
    w = matrix(bits, rows, cols, group, torch.float32)
    assert has_cpu_product(bits, w.group, rows, cols)
    want_FD = values(w)
    packed = pack_for_cpu(w)
    x = torch.randn(T, cols).to(dtype)
    got = cpu_product(x, packed)
    assert got.dtype == dtype and got.shape == (T, rows)
    if T:
        assert_close("y", got, x.double() @ want_FD.T, 2**-7)


def test_matrices_without_a_product_on_cpus() -> None:
    assert not has_cpu_product(8, 100, 16, 100)  # ends the process
    assert not has_cpu_product(8, 32, 16, 64)
    assert not has_cpu_product(4, 32, 15, 64)
    assert not has_cpu_product(4, 96, 16, 96)
    assert not has_cpu_product(4, 64, 16, 96)
    assert not has_cpu_product(8, 0, 16, 0)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("scale", [BF16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "T", "rows", "cols", "group"),
    [
        *((8, 1, 70, 320, 0), (8, 17, 64, 200, 0), (4, 1, 65, 1024, 32), (4, 3, 100, 2048, 128)),
        *((4, 16, 3, 64, 32), (4, 33, 130, 192, 64), (8, 65, 64, 1024, 64), (4, 2, 64, 96, 0)),
    ],
)
def test_few_rows(
    bits: int, T: int, rows: int, cols: int, group: int, scale: torch.dtype, locked: bool
) -> None:
    w = matrix(bits, rows, cols, group, scale)
    x = torch.randn(T, cols).to(BF16)
    locks = make_locks(w.q) if locked else None
    got = int_gemm.kernel(x, w, torch.float32, locks)
    assert_close("y", got, int_gemm.reference(x, w, torch.float32), 1e-5)
    assert_close("definition", got, x.double() @ int_dequant(w, torch.float64).T, 1e-5)
    assert_close("bf16", int_gemm.kernel(x, w, BF16, locks), int_gemm.reference(x, w, BF16), 2**-7)
    assert_close("fp32 x", int_gemm.kernel(x.float(), w, torch.float32), got, 1e-5)
    if locks is not None:
        assert not locks.any()
    # Sums of a step are exact for integers, so only the order of steps counts.
    x = torch.randint(-8, 9, (T, cols)).to(BF16)
    rows_together = int_gemm.kernel(x, w, torch.float32)
    alone = int_gemm.kernel(x[-1:], w, torch.float32)
    assert_bitwise_equal("a row alone", alone, rows_together[-1:])
