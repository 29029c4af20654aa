import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_kernels.attention.merge_lse import merge_lse, softmax_lse
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.definitions import attend

both = pytest.mark.parametrize("merge_lse", [merge_lse.reference, merge_lse.kernel])

Op = Callable[..., Any]  # an operation or one of its implementations


@both
def test_parts_of_any_size_merge_to_the_whole(merge_lse: Op) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 16) * 4, torch.randn(40, 16), torch.randn(40, 8)
    cuts = [0, 1, 1, 30, 40, 40]  # parts of 1, 0, 29, 10 and 0 keys
    o, lse = torch.empty(5, 2, 3, 8), torch.empty(5, 2, 3)
    for n in range(5):
        part = slice(cuts[n], cuts[n + 1])
        for t in range(2):
            for h in range(3):
                average, total = attend(q[t, h], k[part], v[part], 1.0)
                o[n, t, h], lse[n, t, h] = average.float(), total
    got_o, got_lse = merge_lse(o, lse)
    for t in range(2):
        for h in range(3):
            average, total = attend(q[t, h], k, v, 1.0)
            assert_close("o", got_o[t, h], average, 1e-5)
            assert_close("lse", got_lse[t, h], torch.tensor(total), 1e-6)


@both
def test_rows_without_any_key(merge_lse: Op) -> None:
    o, lse = torch.zeros(4, 3, 2, 5), torch.full((4, 3, 2), -math.inf)
    o[1, 0], lse[1, 0] = 7.0, -200.0  # one row has a key, and a very small score
    got_o, got_lse = merge_lse(o, lse)
    assert torch.equal(got_o[0], torch.full((2, 5), 7.0)) and bool((got_lse[0] == -200).all())
    assert torch.equal(got_o[1:], torch.zeros(2, 2, 5))
    assert bool((got_lse[1:] == -math.inf).all())


@both
def test_large_scores_do_not_overflow(merge_lse: Op) -> None:
    lse = torch.tensor([[[300.0]], [[299.0]]])
    got_o, got_lse = merge_lse(torch.tensor([[[[1.0]]], [[[0.0]]]]), lse)
    assert_close("o", got_o, torch.tensor([[[1 / (1 + math.exp(-1))]]]), 1e-6)
    assert_close("lse", got_lse, torch.tensor([[300 + math.log1p(math.exp(-1))]]), 1e-6)


def test_softmax_lse() -> None:
    score = torch.tensor([[500.0, 499.0, -math.inf], [-math.inf] * 3, [-500.0, -math.inf, -500.0]])
    p, lse = softmax_lse(score.clone(), torch.tensor([False, True, False]))
    e = 1 / (1 + math.exp(-1))
    assert_close("p", p, torch.tensor([[e, 1 - e, 0], [0, 0, 0], [0.5, 0, 0.5]]), 1e-6)
    want = torch.tensor([500 + math.log1p(math.exp(-1)), -math.inf, -500 + math.log(2)])
    assert_close("lse", lse, want, 1e-6)


@both
def test_a_single_part_is_itself(merge_lse: Op) -> None:
    o, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2)
    assert_bitwise_equal("o", merge_lse(o, lse)[0], o[0])


@pytest.mark.parametrize("shape", [(1, 5, 3, 130), (17, 2, 4, 64), (40, 1, 2, 7), (3, 0, 2, 8)])
def test_kernel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    o, lse = torch.randn(shape), torch.randn(shape[:3]) * 10
    lse[torch.rand(shape[:3]) < 0.3] = -math.inf
    o[lse == -math.inf] = 0
    # As they come from an all-to-all: the log-sum-exp behind the values.
    packed = torch.cat((o, lse.unsqueeze(-1)), -1)
    got = merge_lse.kernel(packed[..., :-1], packed[..., -1])
    for name, x, y in zip(("o", "lse"), got, merge_lse.reference(o, lse), strict=True):
        if x.numel():
            assert_close(name, x, y, 2e-6)
