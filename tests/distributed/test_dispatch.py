"""Tokens reach their experts and come back, over several ranks; `dispatch.py` has the checks."""

import pytest
import torch

from dsv3.parallel.expert_dispatch import FP8, DispatchSettings, pack, unpack
from dsv3_kernels import act_quant
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed import dispatch
from tests.distributed.ranks import run_ranks


def test_one_rank() -> None:
    dispatch.check_one_rank()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks(world_size: int) -> None:
    run_ranks(dispatch.check_all, world_size)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_what_came_in_fp8_is_quantized_to_the_same(ue8m0: bool) -> None:
    """The experts' products see the values that a rank alone would give them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(33, 384, generator=generator) * torch.rand(33, 1, generator=generator).exp2()
    x[4, 128:256], x[7] = 0, x[7] * 1e-3
    rows = x.bfloat16(), torch.arange(66).view(33, 2) - 1, torch.rand(33, 2, generator=generator)
    settings = DispatchSettings(dtype=FP8, ue8m0=ue8m0)
    got, ids, weight = unpack(pack(rows, settings), rows, settings)
    assert got.dtype == torch.bfloat16
    assert_bitwise_equal("ids", ids, rows[1])
    assert_bitwise_equal("weights", weight, rows[2])
    (q, scale), (q_again, scale_again) = (act_quant(each, ue8m0) for each in (rows[0], got))
    if ue8m0:  # a power of two may move from scale to value: their product is exact
        value, again = (
            a.float().unflatten(1, (3, 128)) * b[..., None]
            for a, b in ((q, scale), (q_again, scale_again))
        )
        assert_bitwise_equal("values", again, value)
    else:
        assert_bitwise_equal("e4m3", q_again.view(torch.uint8), q.view(torch.uint8))
        assert_close("scales", scale_again, scale, 2**-8)
