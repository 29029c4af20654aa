"""Layers, collectives and the sampler over several ranks; the checks are in `layers.py`."""

import pytest

from tests.distributed import layers
from tests.distributed.ranks import Outcomes, RankFailure, run_checks


@pytest.fixture(scope="module", params=[(3, "gloo"), (4, "memory")])
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return run_checks(layers.CHECKS, *request.param)


@pytest.mark.parametrize("check", layers.CHECKS)
def test_several_ranks_give_the_results_of_one(outcomes: Outcomes, check: str) -> None:
    outcomes.verify(check)


def test_a_failure_names_its_rank_and_hides_no_other_check() -> None:
    checks = {"failing": layers.fail_on_rank_1, "mlp": layers.check_mlp}
    outcomes = run_checks(checks, 2, "gloo")
    with pytest.raises(RankFailure, match=r"on rank 1 first:\n(.*\n)*RuntimeError: rank 1 says no"):
        outcomes.verify("failing")
    outcomes.verify("mlp")
