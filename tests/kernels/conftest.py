import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill torch.empty with NaN, so that a value nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
