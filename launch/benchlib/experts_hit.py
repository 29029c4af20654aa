"""How many of a rank's experts some tokens reach, drawn at random as the router would."""

from functools import lru_cache

import numpy as np

from benchlib import roofline
from dsv3.config import ModelConfig

_TRIALS = 64


def experts_hit(
    config: ModelConfig, ranks: int, tokens: int, skew: float = 0.0, busiest: bool = False
) -> tuple[float, float]:
    """Return how many of a rank's experts the tokens reach, and the rows they make there.

    Args:
        config: the model; its groups limit what a token reaches.
        ranks: that the experts are spread over.
        tokens: of the step, all ranks together.
        skew: exponent of the experts' popularity, 0 for uniform.
        busiest: of the ranks, the one with most; otherwise the mean.
    """
    if not busiest and not skew:
        return roofline.experts_hit(config, ranks, tokens)
    return _simulate_hits(config, ranks, min(tokens, 4096), skew, busiest, tokens)


@lru_cache
def _simulate_hits(
    config: ModelConfig, ranks: int, drawn: int, skew: float, busiest: bool, tokens: int
) -> tuple[float, float]:
    """Draw scores for every token and expert; average over trials."""
    rng = np.random.default_rng(0)
    experts, groups = config.n_routed_experts, config.n_group
    bonus = -skew * np.log(rng.permutation(experts) + 1.0)
    trials = max(1, min(_TRIALS, 4096 // max(1, drawn)))
    hit, rows = [], []
    for _ in range(trials):
        score = rng.gumbel(size=(drawn, experts)) + bonus
        if config.topk_method != "greedy" and groups > 1:
            by_group = score.reshape(drawn, groups, -1)
            best = np.sort(by_group, -1)[..., -2:].sum(-1)
            kept = np.argsort(best, -1)[:, -config.topk_group :]
            mask = np.full((drawn, groups), -np.inf)
            np.put_along_axis(mask, kept, 0.0, -1)
            score = (by_group + mask[..., None]).reshape(drawn, -1)
        ids = np.argpartition(score, -config.num_experts_per_tok)[:, -config.num_experts_per_tok :]
        counts = np.bincount(ids.ravel(), minlength=experts).reshape(ranks, -1)
        hit.append((counts > 0).sum(1))
        rows.append(counts.sum(1))
    pick = np.max if busiest else np.mean
    scale = tokens / max(1, drawn)
    return float(np.mean(pick(hit, axis=1))), scale * float(np.mean(pick(rows, axis=1)))
