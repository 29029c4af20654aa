import pytest
import torch
from torch import Tensor

from dsv3_kernels import (
    LocalExperts,
    RouterInput,
    Routing,
    make_locks,
    permute,
    route,
    route_and_permute,
)
from dsv3_kernels.moe.permute import Groups
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

V3 = Routing("sigmoid", "noaux_tc", 8, 8, 4, True, 2.5)
V2_LITE = Routing("softmax", "greedy", 6, 1, 1, False, 1.0)
ONE_OF_THREE = Routing("softmax", "greedy", 1, 1, 1, True, 1.0)


Routed = tuple[Tensor, Tensor, Groups | None]


def check(got: Routed, want: Routed) -> None:
    assert_bitwise_equal("ids", got[0], want[0])
    assert_bitwise_equal("weights", got[1], want[1])
    for name in ("start_E", "count_E", "entry_M", "row_TK"):
        assert_bitwise_equal(name, getattr(got[2], name), getattr(want[2], name))


@pytest.mark.parametrize(
    ("r", "experts", "tokens", "held"),
    [
        (V3, 256, 1, (0, 256)),
        (V3, 256, 1, (85, 1)),
        (V3, 256, 3, (32, 32)),
        (V3, 256, 16, (2, 33)),
        (V3, 256, 17, (224, 32)),  # too many for one launch
        (V2_LITE, 64, 1, (16, 16)),
        (V2_LITE, 64, 5, (64, 4)),  # none of them held here
        (ONE_OF_THREE, 3, 1, (1, 1)),
        (ONE_OF_THREE, 3, 4, (0, 3)),
    ],
)
def test_the_bits_of_two_launches(
    r: Routing, experts: int, tokens: int, held: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    bias = torch.randn(experts) if r is V3 else None
    logits, locks = torch.randn(3, tokens, experts), make_locks(torch.empty(experts, 1))
    logits[:, : tokens // 3] = 0.0  # ties: all choose the same
    position = torch.arange(tokens) % 4 - 1 if tokens > 2 else None
    router, local = RouterInput(logits, bias, r, position), LocalExperts(*held)
    ids, weight = route.kernel(router)
    got = route_and_permute.kernel(router, local, locks)
    check(got, (ids, weight, permute.kernel(ids, local)))
    assert not bool(locks.any()), "as the next launch expects them"
    assert position is None or bool((got[0][position < 0] == -1).all())
    want = route.reference(router)
    assert_close("weights", weight, want[1], 1e-6)
    check(got, (want[0], weight, permute.reference(want[0], local)))


def test_no_tokens() -> None:
    locks = make_locks(torch.empty(256, 1))
    router = RouterInput(torch.zeros(3, 0, 256), None, V3)
    ids, weight, groups = route_and_permute.kernel(router, LocalExperts(32, 32), locks)
    assert groups is not None
    assert ids.shape == weight.shape == (0, 8) and groups.count_E.tolist() == [0] * 32


def test_the_program_that_ends_last_sorts() -> None:
    """No program sorts before all have arrived, whatever their order."""
    logits, locks = torch.randn(1, 4, 256), make_locks(torch.empty(256, 1))
    locks[0] = -1
    router, local = RouterInput(logits, None, V3), LocalExperts(0, 256)
    *_, groups = route_and_permute.kernel(router, local, locks)
    assert int(locks[0]) == 3, "all have come, but one is still waited for"
    sorted_M = permute.reference(route.reference(router)[0], local).entry_M
    assert groups is not None
    assert not torch.equal(groups.entry_M, sorted_M)


def test_a_cpu_sorts_where_experts_are_run() -> None:
    logits, locks = torch.randn(1, 4, 256), make_locks(torch.empty(256, 1))
    router = RouterInput(logits, None, V3)
    ids, weight, groups = route_and_permute(router, LocalExperts(0, 256), locks)
    want = route.reference(router)
    assert groups is None and torch.equal(ids, want[0]) and torch.equal(weight, want[1])
