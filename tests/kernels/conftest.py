import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_kernels._triton import HAS_TRITON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave a GPU to compiled kernels, and tensors of the CPU to the interpreter."""
    is_interpreted = os.environ["TRITON_INTERPRET"] == "1"
    reason = f"needs TRITON_INTERPRET={0 if is_interpreted else 1}"
    for item in items:
        is_ours = Path(__file__).parent in item.path.parents
        if is_ours and is_interpreted == (item.get_closest_marker("gpu") is not None):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that a value that was never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run a kernel's programs in some other order, as a GPU may."""
    if not HAS_TRITON:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    rng, set_dim = np.random.default_rng(0), InterpreterBuilder.set_grid_dim

    def set_grid_dim(self: InterpreterBuilder, *grid: int) -> None:
        set_dim(self, *grid)
        self.order = rng.permutation(int(np.prod(grid)))

    def set_grid_idx(self: InterpreterBuilder, *at: int) -> None:
        place = self.order[np.ravel_multi_index(at, self.grid_dim)]
        self.grid_idx = tuple(int(i) for i in np.unravel_index(place, self.grid_dim))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
