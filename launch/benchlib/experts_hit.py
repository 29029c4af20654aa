"""Expected number of a rank's experts that the tokens of a step reach, by simulated routing."""

from functools import lru_cache

import numpy as np

from benchlib import roofline
from dsv3.config import ModelConfig

_TRIALS = 64


def experts_hit(
    config: ModelConfig, ranks: int, tokens: int, skew: float = 0.0, busiest: bool = False
) -> tuple[float, float]:
    """Return the number of a rank's experts that tokens reach, and the rows routed to them.

    Args:
        config: the model; its expert groups limit the experts of a token.
        ranks: number of ranks that share the experts.
        tokens: tokens of the step, all ranks together.
        skew: Zipf exponent of the experts' popularity; 0 is uniform.
        busiest: return the figures of the busiest rank instead of the mean.
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
    experts = config.n_routed_experts
    groups = config.n_group
    bonus = -skew * np.log(rng.permutation(experts) + 1.0)
    trials = max(1, min(_TRIALS, 4096 // max(1, drawn)))
    hits: list[np.ndarray] = []
    rows: list[np.ndarray] = []
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
        hits.append((counts > 0).sum(1))
        rows.append(counts.sum(1))
    reduce = np.max if busiest else np.mean
    scale = tokens / max(1, drawn)
    return float(np.mean(reduce(hits, axis=1))), scale * float(np.mean(reduce(rows, axis=1)))
