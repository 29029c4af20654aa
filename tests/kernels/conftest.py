import numpy as np
import pytest
import torch

from dsv3_kernels._triton import HAS_TRITON


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill torch.empty with NaN, so that a value nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _any_order(monkeypatch: pytest.MonkeyPatch):
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
