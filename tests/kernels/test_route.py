import math

import pytest
import torch

from dsv3_kernels import RouterInput, Routing, route
from dsv3_kernels.testing import assert_bitwise_equal, assert_close


def rule(method: str, groups: tuple[int, int] = (4, 2), k: int = 3, norm: bool = False) -> Routing:
    return Routing(
        scoring_func="sigmoid" if method == "noaux_tc" else "softmax",
        topk_method=method,
        num_experts_per_tok=k,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )


def chosen(logits: list[float], bias: list[float] | None, r: Routing) -> dict[int, float]:
    """One token's experts and weights, by the words of the papers."""
    if r.scoring_func == "softmax":
        total = sum(math.exp(x) for x in logits)
        score = [math.exp(x) / total for x in logits]
    else:
        score = [1 / (1 + math.exp(-x)) for x in logits]
    biased = score if bias is None else [s + b for s, b in zip(score, bias, strict=True)]
    experts = list(range(len(score)))
    if r.topk_method in ("group_limited_greedy", "noaux_tc"):
        size = len(score) // r.n_group
        groups = [experts[g * size : (g + 1) * size] for g in range(r.n_group)]

        def worth(group: list[int]) -> float:
            best = sorted((biased[e] for e in group), reverse=True)
            return sum(best[:2]) if r.topk_method == "noaux_tc" else best[0]

        groups = sorted(groups, key=worth, reverse=True)[: r.topk_group]
        experts = [e for group in groups for e in group]
    best = sorted(experts, key=lambda e: biased[e], reverse=True)[: r.num_experts_per_tok]
    weight = {e: score[e] for e in best}
    if r.norm_topk_prob:
        weight = {e: w / sum(weight.values()) for e, w in weight.items()}
    return {e: w * r.routed_scaling_factor for e, w in weight.items()}


@pytest.mark.parametrize(
    ("r", "bias"),
    [
        (rule("greedy", (1, 1)), None),
        (rule("greedy", (4, 2)), None),  # "greedy" knows no groups
        (rule("greedy", (1, 1), norm=True), None),
        (rule("group_limited_greedy"), None),
        (rule("group_limited_greedy", (4, 1)), None),
        (rule("noaux_tc", norm=True), 0.3),
        (rule("noaux_tc", norm=True), -5.0),  # every biased score negative: a mask of 0 would win
        (rule("noaux_tc", norm=True), 10.0),
        (rule("noaux_tc", (1, 1), norm=True), -0.2),  # Kimi-K2: one group
        (rule("noaux_tc", (8, 3), k=6), 0.1),  # all experts of the kept groups
        (rule("noaux_tc", k=1, norm=True), 0.1),
    ],
    ids=str,
)
def test_route(r: Routing, bias: float | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(129, 16) * 2
    bias_E = None if bias is None else bias + torch.randn(16) * 0.3
    ids, weight = route(RouterInput(logits[None], bias_E, r))
    assert ids.dtype == torch.int64 and weight.dtype == torch.float32
    for t in range(len(logits)):
        got = dict(zip(ids[t].tolist(), weight[t].tolist(), strict=True))
        want = chosen(logits[t].tolist(), None if bias_E is None else bias_E.tolist(), r)
        assert got == pytest.approx(want, rel=1e-5), t


def test_weights_survive_a_bias_that_swallows_the_scores() -> None:
    """(score + bias) - bias would be 0 or a coarse step."""
    logits = torch.tensor([[-12.0, -11.0, -13.0, -14.0]])
    ids, weight = route(
        RouterInput(logits[None], torch.full((4,), 100.0), rule("noaux_tc", (1, 1), k=4))
    )
    want = {e: 2.5 / (1 + math.exp(-x)) for e, x in enumerate(logits[0].tolist())}
    assert dict(zip(ids[0].tolist(), weight[0].tolist(), strict=True)) == pytest.approx(want)


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(1)
    logits, bias, r = torch.randn(130, 32), torch.randn(32), rule("noaux_tc", (8, 4), 8, True)
    part = route(RouterInput(logits[None, 40:43], bias, r))
    for got, want in zip(part, route(RouterInput(logits[None], bias, r)), strict=True):
        assert_bitwise_equal("slice", got, want[40:43])


def v3_like(
    method: str, groups: tuple[int, int], k: int, norm: bool, experts: int
) -> tuple[Routing, torch.Tensor, torch.Tensor | None]:
    """A rule, logits with rows of ties, and a bias that makes ties of its own."""
    logits = torch.randn(6, experts)
    logits[1] = logits[1].round()
    logits[2] = 0.0
    bias = torch.randn(experts).round() if method == "noaux_tc" else None
    return rule(method, groups, k, norm), logits, bias


@pytest.mark.parametrize(
    ("method", "groups", "k", "norm", "experts"),
    [
        ("noaux_tc", (8, 4), 8, True, 256),  # V3
        ("noaux_tc", (1, 1), 8, True, 384),  # Kimi-K2
        ("group_limited_greedy", (8, 3), 6, False, 160),  # V2: groups of 20
        ("greedy", (1, 1), 6, False, 64),  # V2-Lite
        ("greedy", (1, 1), 7, True, 7),  # all of them
        ("noaux_tc", (8, 2), 8, False, 24),  # more than the kept groups hold
        ("noaux_tc", (8, 4), 3, True, 8),  # groups of one
        ("noaux_tc", (16, 5), 16, True, 512),
    ],
)
def test_kernel(method: str, groups: tuple[int, int], k: int, norm: bool, experts: int) -> None:
    torch.manual_seed(2)
    r, logits, bias = v3_like(method, groups, k, norm, experts)
    ids, weight = route.kernel(RouterInput(logits[None], bias, r))
    want_ids, want_weight = route.reference(RouterInput(logits[None], bias, r))
    assert_bitwise_equal("ids", ids, want_ids)
    assert_close("weights", weight, want_weight, 1e-6)


def test_ties_go_to_the_lowest_id() -> None:
    r = rule("noaux_tc", (4, 2), 3)
    for form in (route.reference, route.kernel):
        ids, _ = form(RouterInput(torch.zeros(1, 2, 16), torch.zeros(16), r))
        assert ids.tolist() == [[0, 1, 2]] * 2


def test_kernel_rows_do_not_see_each_other() -> None:
    torch.manual_seed(3)
    r, logits, bias = v3_like("noaux_tc", (8, 4), 8, True, 64)
    whole = route.kernel(RouterInput(logits[None], bias, r))
    for got, want in zip(route.kernel(RouterInput(logits[None, 4:5], bias, r)), whole, strict=True):
        assert_bitwise_equal("slice", got, want[4:5])
    none = route.kernel(RouterInput(logits[None, :0], bias, r))
    assert [t.shape for t in none] == [(0, 8), (0, 8)]


def test_parts_are_added_up() -> None:
    torch.manual_seed(4)
    r, logits, bias = v3_like("noaux_tc", (8, 4), 8, True, 64)
    parts = torch.randint(-4, 5, (3, *logits.shape)).float()
    for form in (route.reference, route.kernel):
        got = form(RouterInput(parts, bias, r))
        want = form(RouterInput(parts.sum(0, keepdim=True), bias, r))
        assert_bitwise_equal("ids", got[0], want[0])
        assert_bitwise_equal("weights", got[1], want[1])


def test_garbage_rows_still_name_experts() -> None:
    """Unused rows of a CUDA graph may hold any bits; their expert ids must stay in range."""
    r = rule("noaux_tc", (8, 4), 8, True)
    ids, _ = route.kernel(RouterInput(torch.full((1, 1, 32), float("nan")), torch.zeros(32), r))
    assert len(set(ids[0].tolist())) == 8 and int(ids.min()) >= 0 and int(ids.max()) < 32


def test_padding_chooses_nothing() -> None:
    """And changes nothing for the rows beside it."""
    torch.manual_seed(5)
    r, logits, bias = v3_like("noaux_tc", (8, 4), 8, True, 64)
    position = torch.arange(len(logits)) % 3 - 1
    is_padding = position < 0
    assert 0 < int(is_padding.sum()) < len(logits)
    for form in (route.reference, route.kernel):
        got = form(RouterInput(logits[None], bias, r, position))
        want = form(RouterInput(logits[None], bias, r))
        assert bool((got[0][is_padding] == -1).all())
        for a, b in zip(got, want, strict=True):
            assert_bitwise_equal("the others", a[~is_padding], b[~is_padding])
