from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.oracle.families import Oracle, make_oracle

# The models are tiny: a second thread would only wait, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Return a function from a family's name to its checkpoint, made once."""
    return cache(lambda family: make_oracle(family, tmp_path_factory.mktemp(family)))
