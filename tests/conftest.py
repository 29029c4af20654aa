"""Settings required before torch or triton is imported, and common fixtures."""

import os

# Kernels run in triton's interpreter, on a CPU, in every test.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The models are tiny: a second thread would only wait, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from benchlib.interpreter import patch_interpreter

if os.environ["TRITON_INTERPRET"] == "1":
    patch_interpreter()


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function from a family's name to its random checkpoint, made once."""
    from tests.oracle.families import make_oracle

    return cache(lambda family: make_oracle(family, tmp_path_factory.mktemp(family)))
