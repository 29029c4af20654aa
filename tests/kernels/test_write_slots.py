from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_kernels.attention.write_slots import write_slots
from dsv3_kernels.testing import assert_bitwise_equal

Op = Callable[..., Any]  # an operation or one of its implementations


@pytest.mark.parametrize("write", [write_slots.reference, write_slots.kernel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("width", [1, 24, 1030])
@pytest.mark.parametrize("slots", [[], [3], [7, -1, 0, 5, -1], [-1, -1]])
def test_write_slots(write: Op, dtype: torch.dtype, width: int, slots: list[int]) -> None:
    torch.manual_seed(0)
    cache = torch.randint(0, 200, (9, width)).to(dtype)
    rows = torch.randint(0, 200, (len(slots), width + 3))[:, :width].to(dtype)
    want = cache.clone()
    for slot, row in zip(slots, rows, strict=True):
        if slot >= 0:
            want[slot] = row
    write(cache, torch.tensor(slots, dtype=torch.int64), rows)
    assert_bitwise_equal("cache", cache, want)


@pytest.mark.parametrize("write", [write_slots.reference, write_slots.kernel])
def test_rows_are_cast(write: Op) -> None:
    cache = torch.zeros(2, 3, dtype=torch.float16)
    write(cache, torch.tensor([1]), torch.tensor([[1.0, 0.1, -2.0]]))
    assert torch.equal(cache, torch.tensor([[0, 0, 0], [1, 0.1, -2]], dtype=torch.float16))
