import math

import pytest
import torch

from dsv3_kernels import Routing, route
from dsv3_kernels.testing import assert_bitwise_equal


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
    ids, weight = route(logits, bias_E, r)
    assert ids.dtype == torch.int64 and weight.dtype == torch.float32
    for t in range(len(logits)):
        got = dict(zip(ids[t].tolist(), weight[t].tolist(), strict=True))
        want = chosen(logits[t].tolist(), None if bias_E is None else bias_E.tolist(), r)
        assert got == pytest.approx(want, rel=1e-5), t


def test_weights_survive_a_bias_that_swallows_the_scores() -> None:
    """(score + bias) - bias would be 0 or a coarse step."""
    logits = torch.tensor([[-12.0, -11.0, -13.0, -14.0]])
    ids, weight = route(logits, torch.full((4,), 100.0), rule("noaux_tc", (1, 1), k=4))
    want = {e: 2.5 / (1 + math.exp(-x)) for e, x in enumerate(logits[0].tolist())}
    assert dict(zip(ids[0].tolist(), weight[0].tolist(), strict=True)) == pytest.approx(want)


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(1)
    logits, bias, r = torch.randn(130, 32), torch.randn(32), rule("noaux_tc", (8, 4), 8, True)
    for got, want in zip(route(logits[40:43], bias, r), route(logits, bias, r), strict=True):
        assert_bitwise_equal("slice", got, want[40:43])
