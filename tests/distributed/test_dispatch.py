"""Expert dispatch and combine over several ranks; the checks are in `dispatch.py`."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from dsv3.parallel.token_rows import (
    FP8,
    DispatchSettings,
    TokenRows,
    deserialize_rows,
    serialize_rows,
)
from dsv3_kernels import act_quant
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed import dispatch
from tests.distributed.ranks import Check, Outcomes, alone, run_checks

CHECKS = {size: dispatch.checks(size) for size in (2, 4, 8)}


@pytest.fixture(scope="module")
def outcomes_of() -> Callable[[int], Outcomes]:
    """The checks of a world size, run once."""
    return cache(lambda size: run_checks(CHECKS[size], size))


@pytest.mark.parametrize(
    ("size", "check"), [(size, check) for size, checks in CHECKS.items() for check in checks]
)
def test_several_ranks_give_the_results_of_one(
    outcomes_of: Callable[[int], Outcomes], size: int, check: str
) -> None:
    outcomes_of(size).verify(check)


@pytest.mark.parametrize(
    "check", [dispatch.check_routings, dispatch.check_fixed, dispatch.check_moe]
)
def test_one_rank(check: Check) -> None:
    check(alone())


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantizing_received_fp8_again_does_not_change_it(ue8m0: bool) -> None:
    """The experts' products get the same values as on a single rank."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(33, 384, generator=generator) * torch.rand(33, 1, generator=generator).exp2()
    x[4, 128:256] = 0
    x[7] *= 1e-3
    rows = TokenRows(
        x_MD=x.bfloat16(),
        ids_MK=torch.arange(66).view(33, 2) - 1,
        weight_MK=torch.rand(33, 2, generator=generator),
    )
    settings = DispatchSettings(dtype=FP8, ue8m0=ue8m0)
    got = deserialize_rows(serialize_rows(rows, settings), rows, settings)
    assert got.x_MD.dtype == torch.bfloat16
    assert_bitwise_equal("ids", got.ids_MK, rows.ids_MK)
    assert_bitwise_equal("weights", got.weight_MK, rows.weight_MK)
    q, scale = act_quant(rows.x_MD, ue8m0)
    q_again, scale_again = act_quant(got.x_MD, ue8m0)
    if ue8m0:  # a power of two may move from scale to value: their product is exact
        value = q.float().unflatten(1, (3, 128)) * scale[..., None]
        value_again = q_again.float().unflatten(1, (3, 128)) * scale_again[..., None]
        assert_bitwise_equal("values", value_again, value)
    else:
        assert_bitwise_equal("e4m3", q_again.view(torch.uint8), q.view(torch.uint8))
        assert_close("scales", scale_again, scale, 2**-8)
