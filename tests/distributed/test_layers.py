"""Layers, collectives and the sampler over several ranks; the checks are in `layers.py`."""

import pytest

from tests.distributed import layers
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize("world_size", [3, 4])
def test_layers(world_size: int) -> None:
    run_ranks(layers.check_all, world_size)


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(Exception, match="rank 1 says no"):
        run_ranks(layers.fail_on_rank_1, 2)
