"""Use of a rank's experts in a step whose tokens choose all experts equally often."""

from functools import lru_cache

import numpy as np

from benchlib.step_shape import ExpertHits
from dsv3.config import ModelConfig

_TRIALS = 1024  # of few tokens
_MOST_DRAWN = 4096  # tokens


def mean_hits(config: ModelConfig, ranks: int, tokens: int) -> ExpertHits:
    """Return the mean use of a rank's experts.

    Args:
        config: the model.
        ranks: number of ranks that share the experts.
        tokens: tokens of all ranks together.
    """
    experts = config.n_routed_experts
    chosen = config.num_experts_per_tok
    missed = (1 - chosen / experts) ** tokens
    return ExpertHits(experts / ranks * (1 - missed), tokens * chosen / ranks)


@lru_cache
def busiest_hits(config: ModelConfig, ranks: int, tokens: int) -> ExpertHits:
    """Return the use of the busiest rank's experts, by simulated routing within expert groups."""
    rng = np.random.default_rng(0)
    drawn = min(tokens, _MOST_DRAWN)
    experts = config.n_routed_experts
    groups = config.n_group
    trials = max(1, min(_TRIALS, _MOST_DRAWN // max(1, drawn)))
    hits: list[int] = []
    rows: list[int] = []
    for _ in range(trials):
        score = rng.gumbel(size=(drawn, experts))
        if config.topk_method != "greedy" and groups > 1:
            by_group = score.reshape(drawn, groups, -1)
            best = np.sort(by_group, -1)[..., -2:].sum(-1)
            kept = np.argsort(best, -1)[:, -config.topk_group :]
            mask = np.full((drawn, groups), -np.inf)
            np.put_along_axis(mask, kept, 0.0, -1)
            score = (by_group + mask[..., None]).reshape(drawn, -1)
        ids = np.argpartition(score, -config.num_experts_per_tok)[:, -config.num_experts_per_tok :]
        counts = np.bincount(ids.ravel(), minlength=experts).reshape(ranks, -1)
        hits.append((counts > 0).sum(1).max())
        rows.append(counts.sum(1).max())
    scale = tokens / max(1, drawn)
    return ExpertHits(float(np.mean(hits)), scale * float(np.mean(rows)))
