"""Experts placed by file and moved live, over several ranks; the checks are in `placement.py`."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from dsv3.engine.balance import moves
from tests.distributed import placement
from tests.distributed.ranks import Outcomes, run_checks

CHECKS = {size: list(placement.checks(size, "")) for size in (2, 4)}


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcomes]:
    """The checks of a world size, run once."""

    def run(size: int) -> Outcomes:
        folder = tmp_path_factory.mktemp("placement")
        return run_checks(placement.checks(size, str(folder)), size)

    return cache(run)


@pytest.mark.parametrize(
    ("size", "check"), [(size, check) for size, checks in CHECKS.items() for check in checks]
)
def test_the_placement_changes_no_result(
    outcomes_of: Callable[[int], Outcomes], size: int, check: str
) -> None:
    outcomes_of(size).verify(check)


def test_an_expert_is_copied_from_the_nearest_rank() -> None:
    old = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7])
    new = np.array([1, 1, 3, 3, 0, 0, 2, 7, 4, 5, 6, 7])
    # Ranks of two experts, hosts of two ranks: 1, 3 and 0 are on the same host, 7 on another one.
    assert moves(old, new, 6, 2) == [(1, 0), (3, 2), (4, 5), (11, 7)]
    assert moves(old, old, 6, 2) == []
