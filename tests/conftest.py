"""Before anything imports triton: its kernels run in the interpreter, on a CPU, in every test."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function from a family's name to its random checkpoint, made once."""
    from tests.oracle.families import make_oracle

    return cache(lambda family: make_oracle(family, tmp_path_factory.mktemp(family)))
