from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_kernels import LocalExperts, permute, unpermute
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

Op = Callable[..., Any]  # an operation or one of its implementations


def routing(tokens: int, k: int, experts: int) -> Tensor:
    ids = [torch.randperm(experts)[:k] for _ in range(tokens)]
    return torch.stack(ids) if ids else torch.empty((0, k), dtype=torch.int64)


CASES = {
    "decode": (routing(1, 8, 32), 8, 8),
    "ragged": (routing(63, 6, 20), 4, 7),
    "several blocks": (routing(700, 8, 16), 0, 16),
    "nothing": (routing(0, 4, 8), 0, 4),
    "all to one": (torch.full((9, 1), 3), 2, 4),
    "none held here": (torch.full((9, 2), 3), 4, 4),
    "no expert's": (torch.full((5, 3), -1), 0, 2),
    "twice the same": (torch.tensor([[1, 1, 0], [0, -1, 1]]), 0, 2),
}


@pytest.mark.parametrize("form", [permute.reference, permute.kernel])
@pytest.mark.parametrize("case", CASES)
def test_permute(case: str, form: Op) -> None:
    ids, first, held = CASES[case]
    groups = form(ids, LocalExperts(first, held))
    flat = ids.flatten().tolist()
    entries = [i for e in range(first, first + held) for i, x in enumerate(flat) if x == e]
    assert groups.entry_M.tolist() == entries + [-1] * (len(flat) - len(entries))
    assert groups.row_TK.shape == ids.shape
    rows = {i: row for row, i in enumerate(entries)}
    assert groups.row_TK.flatten().tolist() == [rows.get(i, -1) for i in range(len(flat))]
    counts = [flat.count(e) for e in range(first, first + held)]
    assert groups.count_E.tolist() == counts
    assert groups.start_E.tolist() == [sum(counts[:e]) for e in range(held)]
    parts = (groups.entry_M, groups.row_TK, groups.count_E, groups.start_E)
    assert {t.dtype for t in parts} == {torch.int32}


@pytest.mark.parametrize("form", [unpermute.reference, unpermute.kernel])
@pytest.mark.parametrize(("tokens", "columns"), [(0, 8), (1, 7), (63, 130), (5, 1100)])
def test_unpermute(tokens: int, columns: int, form: Op) -> None:
    torch.manual_seed(0)
    ids = routing(tokens, 4, 12)
    rows = permute(ids, LocalExperts(3, 6)).row_TK
    y = torch.full((4 * tokens, columns), float("nan"))  # rows that are never written
    y[rows[rows >= 0].long()] = torch.randn(int((rows >= 0).sum()), columns)
    want = torch.zeros(tokens, columns, dtype=torch.float64)
    for t in range(tokens):
        for k in range(4):
            if 3 <= ids[t, k] < 9:
                want[t] += y[rows[t, k]].double()
    got = form(y, rows)
    assert got.dtype == torch.float32
    assert_close("sums", got, want, 1e-6)
    addend = torch.randn(tokens, columns)
    assert_bitwise_equal("and more", form(y, rows, addend), got + addend)
    part = slice(tokens // 2, tokens // 2 + 2)
    assert_bitwise_equal("slice", form(y, rows[part]), got[part])


def test_there_and_back() -> None:
    torch.manual_seed(1)
    ids, x = routing(33, 3, 9), torch.randn(33, 5)
    groups = permute.kernel(ids, LocalExperts(0, 9))
    rows = x[groups.entry_M.long() // 3]
    assert_bitwise_equal("rows", unpermute.kernel(rows, groups.row_TK), x + x + x)
