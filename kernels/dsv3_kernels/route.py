"""Expert routing: scores, group-limited top-k, weights. One small row per token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """How a model chooses experts (field names of the HF config)."""

    scoring_func: str
    topk_method: str
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


def _limit_to_groups(choice_TE: Tensor, r: Routing) -> Tensor:
    """Set the experts outside the best `topk_group` groups to -inf.

    -inf, not 0: a biased score may be negative.
    """
    groups_TgE = choice_TE.view(choice_TE.shape[0], r.n_group, -1)
    if r.topk_method == "noaux_tc":
        group_score = groups_TgE.topk(min(2, groups_TgE.shape[-1]), dim=-1).values.sum(-1)
    else:
        group_score = groups_TgE.amax(-1)
    kept = group_score.topk(r.topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
    return groups_TgE.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def route_ref(logits_TE: Tensor, bias_E: Tensor | None, r: Routing) -> tuple[Tensor, Tensor]:
    """Define `route`."""
    logits = logits_TE.float()
    score_TE = logits.softmax(-1) if r.scoring_func == "softmax" else logits.sigmoid()
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if r.topk_method != "greedy" and r.n_group > 1:
        choice_TE = _limit_to_groups(choice_TE, r)
    ids_TK = choice_TE.topk(r.num_experts_per_tok, dim=-1, sorted=False).indices
    # The weights are the unbiased scores; never recovered as (biased - bias), which cancels.
    weight_TK = score_TE.gather(1, ids_TK)
    if r.norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weight_TK * r.routed_scaling_factor


def route(logits_TE: Tensor, bias_E: Tensor | None, r: Routing) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their weights.

    scores = sigmoid or softmax of the logits; the choice is by score + bias, limited to the best
    groups (a group's score: the sum of its two best for noaux_tc, its best for
    group_limited_greedy); the weights are the chosen scores, normalized where the model does so,
    times routed_scaling_factor.

    Args:
        logits_TE: [T, E] router logits, float32.
        bias_E: [E] float32 `e_score_correction_bias`, or None.
        r: the model's routing rule.

    Returns:
        ids_TK: [T, K] int64 expert ids, in no particular order.
        weight_TK: [T, K] float32.

    Source: DeepSeek-V2 paper 2.2.2 (softmax forms), DeepSeek-V3 report eq. 12-16 (noaux_tc).
    """
    return route_ref(logits_TE, bias_E, r)
