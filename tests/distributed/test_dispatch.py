"""Tokens reach their experts and come back, over several ranks; `dispatch.py` has the checks."""

import pytest

from tests.distributed import dispatch
from tests.distributed.ranks import run_ranks


def test_one_rank() -> None:
    dispatch.check_one_rank()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks(world_size: int) -> None:
    run_ranks(dispatch.check_all, world_size)
