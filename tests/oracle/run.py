"""Our model on one rank: its logits at every position, and its greedy answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.engine.engine import follow
from dsv3.engine.runner import BatchBuilder
from dsv3.engine.start import Started, start
from dsv3.engine.step_plan import StepPlan
from dsv3.request import Completion, Request, SamplingParams
from dsv3.settings import EngineConfig

CPU = torch.device("cpu")


def start_alone(path: Path, **settings: Any) -> Started:
    """Load a checkpoint in this process."""
    mesh = Mesh(ParallelConfig(), CPU, SingleRank(), SingleRank(), SingleRank(), 1)
    return start(path, EngineConfig(**{"kv_cache_size": "2048tok"} | settings), mesh)


def all_logits(
    started: Started, texts: list[list[int]], chunk: int, limit: int | None = None
) -> list[Tensor]:
    """Feed all texts together, `chunk` tokens of each a step; return each one's [L, W] logits.

    Sequences with more than `limit` new tokens are attended in expanded form; by default as many
    as the engine would.
    """
    runner = started.runner
    model, cache = runner.model, runner.cache
    rule = runner.rule if limit is None else replace(runner.rule, max_queries=limit)
    pages = cache.layout.pages_for(max(map(len, texts)))
    found: list[list[Tensor]] = [[] for _ in texts]
    for start_at in range(0, max(map(len, texts)), chunk):
        # Shorter sequences leave; the rest are ordered as plans demand: first those that attend
        # straight to the cache, each kind by the number of new tokens.
        parts = [(i, t[start_at : start_at + chunk]) for i, t in enumerate(texts)]
        step = sorted(
            (part for part in parts if part[1]),
            key=lambda part: (not rule.absorbs(len(part[1]), start_at), len(part[1])),
        )
        plan = StepPlan(
            token_ids=np.concatenate([np.array(new, np.int32) for _, new in step]),
            query_len=np.array([len(new) for _, new in step], np.int32),
            context_len=np.full(len(step), start_at, np.int32),
            page_count=np.full(len(step), pages, np.int32),
            # Pages of different sequences interleave.
            pages=np.array(
                [1 + i + p * len(texts) for i, _ in step for p in range(pages)], np.int32
            ),
        )
        with torch.inference_mode():
            batch = BatchBuilder(plan, cache.layout, CPU, rule).build()
            logits = model.logits(model(batch, cache))
        for (i, _), part in zip(step, logits.split([len(new) for _, new in step]), strict=True):
            found[i].append(part)
    return [torch.cat(parts) for parts in found]


def answers(started: Started, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
    """Run all prompts as one batch."""
    engine = started.engine
    assert engine is not None
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_ids=prompt, params=params))
    done = {}
    while engine.has_work():
        for out in engine.step():
            if out.completion is not None:
                done[out.request_id] = out.completion
    return [done[str(i)] for i in range(len(prompts))]


def score(mesh: Mesh, paths: list[Path], prompts: list[list[int]], want: list[list[float]]) -> None:
    """Check the log-probabilities of the prompts' tokens; this module loads fast in new processes.

    Args:
        mesh: this rank.
        paths: checkpoints to score them with.
        prompts: token ids.
        want: log-probabilities of all tokens but each first.
    """
    for path in paths:
        started = start(path, EngineConfig(kv_cache_size="2048tok"), mesh)
        if started.engine is None:
            follow(started.runner, started.channel)
            continue
        scores = answers(started, prompts, SamplingParams(max_tokens=0, prompt_logprobs=0))
        started.engine.stop()
        for done, expected in zip(scores, want, strict=True):
            found = torch.tensor([t.logprob for t in done.prompt_logprobs or []])
            assert len(found) == len(expected)
            assert torch.allclose(found, torch.tensor(expected), rtol=0, atol=5e-4), path
