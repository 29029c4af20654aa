from unittest import mock

import pytest
import torch

from dsv3.parallel.storage import BlockedFloats
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix
from dsv3_kernels import has_blocked_product, make_locks
from dsv3_kernels.gemm import blocked
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def is_blocked(matrix: Matrix) -> bool:
    return isinstance(matrix.storage, BlockedFloats)


def packed(
    num: int, rows: int, cols: int, dtype: torch.dtype = BF16
) -> tuple[Matrix, list[torch.Tensor]]:
    fmt = WeightFormat(dtype, CPU, cpu_products=True)
    matrix = Matrix([[f"{e}"] for e in range(num)], [rows], cols, fmt)
    torch.manual_seed(num + rows + cols)
    plain = []
    for target in matrix.targets():
        target.dest.normal_()
        plain.append(target.dest.clone())
    matrix.pack()
    return matrix, plain


@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 33])
@pytest.mark.parametrize(("rows", "cols"), [(96, 64), (7, 33), (130, 200)])
def test_products_of_packed_matrices(rows: int, cols: int, T: int) -> None:
    matrix, plain = packed(2, rows, cols)
    assert is_blocked(matrix) == has_blocked_product(plain[0])
    for e in range(2):
        x = torch.randn(T, 2 * cols)[:, :cols].to(BF16)
        y = matrix.stack().product(e, x)
        assert y.shape == (T, rows) and y.dtype == BF16
        if T:
            assert_close("y", y, x.double() @ plain[e].double().T, 2**-7)
    x = torch.randn(T, cols)
    y = matrix.multiply(x, make_locks(plain[0]), torch.float32)
    assert y.shape == (T, rows) and y.dtype == torch.float32
    if T:
        assert_close("first", y, x.to(BF16).double() @ plain[0].double().T, 2**-7)


def test_packed_matrices_are_moved_and_unpacked() -> None:
    mine, plain = packed(4, 32, 64)
    other, theirs = packed(4, 32, 64)
    assert not any(x.numel() for x in mine.take([]))
    mine.put([], other.take([]))
    mine.put([1, 3], other.take([0, 2]))
    x = torch.randn(4, 64).to(BF16)
    for e, w in enumerate((plain[0], theirs[0], plain[2], theirs[2])):
        assert_close("product", mine.stack().product(e, x), x.double() @ w.double().T, 2**-7)
    for target, w in zip(mine.targets(), (plain[0], theirs[0], plain[2], theirs[2]), strict=True):
        assert_bitwise_equal("unpacked", target.dest, w)
    assert not is_blocked(mine)


def test_only_factors_in_bfloat16_are_packed() -> None:
    assert not is_blocked(packed(1, 32, 64, torch.float32)[0])
    fmt = WeightFormat(BF16, CPU, cpu_products=True)
    looked_up = Matrix([["e"]], [32], 64, fmt, by_rows=True)
    looked_up.pack()
    assert not is_blocked(looked_up) and looked_up.weight.shape == (1, 32, 64)


@pytest.mark.parametrize("T", [1, 2])
def test_large_matrices_stay_plain_with_amx(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_LARGE", 130 * 200)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    product = mock.Mock(wraps=torch.mv)
    monkeypatch.setattr(torch, "mv", product)
    matrix, plain = packed(1, 130, 200)
    assert not is_blocked(matrix)
    x = torch.randn(T, 200).to(BF16)
    y = matrix.multiply(x, make_locks(plain[0]), torch.float32)
    assert product.call_count == (T == 1) and y.dtype == torch.float32
    assert_close("y", y, x.double() @ plain[0].double().T, 2**-7)
    assert is_blocked(packed(3, 130, 199)[0]) == has_blocked_product(plain[0][:, :199])
