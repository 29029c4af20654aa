"""Experts placed by file and moved live, over several ranks; the checks are in `placement.py`."""

from pathlib import Path

import pytest

from tests.distributed import placement
from tests.distributed.ranks import run_ranks


def test_an_expert_is_copied_from_the_nearest_rank() -> None:
    placement.check_moves()


@pytest.mark.parametrize("world_size", [2, 4])
def test_answers(world_size: int, tmp_path: Path) -> None:
    run_ranks(placement.check_all, world_size, str(tmp_path))
