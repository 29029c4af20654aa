"""Decode steps on static buffers give the tokens that other batches give, over several steps."""

from typing import Any

import numpy as np
import pytest
import torch

from benchlib.step_shape import StepShape
from dsv3.cache.pool import CachePool
from dsv3.config_files import DEMO
from dsv3.distributed.mesh import Mesh
from dsv3.engine.adjust import NOT_FED, AdjustedRow, Adjuster, pack_adjustments
from dsv3.engine.cuda_graphs import (
    MAX_GATHERED,
    MAX_PROMPT_KEYS,
    MAX_ROWS,
    Bucket,
    GraphRunner,
    most_rows,
    page_bucket,
    row_bucket,
)
from dsv3.engine.measured_memory import largest_step
from dsv3.engine.runner import Runner
from dsv3.engine.start import Started, start
from dsv3.engine.static_buffers import _ARRAYS, StaticBuffers
from dsv3.engine.step_plan import NO_TARGET, StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.moe import Router
from dsv3.parallel.linear import Linear, VocabParallelHead
from dsv3.request import SamplingParams
from dsv3.settings import EngineConfig
from tests.distributed.ranks import CPU, alone, run_ranks

PROMPTS = (30, 7, 100, 1, 64)
STEPS, ARRIVES = 6, 4


def plan(context: list[int], new: list[list[int]], pages_each: int, **sampling: Any) -> StepPlan:
    """Sequence b holds pages b * pages_each + 1 and on."""
    count, zeros = len(context), np.zeros(len(context), np.int32)
    lengths = np.array([len(n) for n in new], np.int32)
    drawn = {
        "temperature": np.zeros(count, np.float32),
        "top_p": np.ones(count, np.float32),
        "top_k": zeros,
        "min_p": np.zeros(count, np.float32),
        "answer": zeros,
    }
    return StepPlan(
        token_ids=np.concatenate(new).astype(np.int32),
        query_len=lengths,
        context_len=np.array(context, np.int32),
        page_count=zeros + pages_each,
        pages=np.arange(1, 1 + count * pages_each, dtype=np.int32),
        row=lengths.cumsum(dtype=np.int32) - 1,
        position=np.array(context, np.int32) + lengths,
        target=zeros + NO_TARGET,
        top_logprobs=zeros - 1,
        seed_low=np.arange(count, dtype=np.int32) - 2,
        seed_high=zeros + 5,
        **{**drawn, **sampling},
    )


def answers(runner: Runner, sampling: dict[str, Any]) -> list[list[int]]:
    """Prefill, then decode: fed on the device, from the host, and with sequences leaving.

    A prompt comes in while others decode.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2000, n).tolist() for n in sorted(PROMPTS)]
    count = len(prompts)
    context = [0] * count
    found = [runner.run([plan(context, prompts, 3, **sampling)]).token_M.tolist()]
    context = [len(p) for p in prompts]
    for step in range(STEPS):
        # The last two sequences leave after two steps.
        if step == 2:
            count, context = count - 2, context[: count - 2]
        fed = [[-1 - b] if step % 3 else [found[-1][b]] for b in range(count)]
        if step == ARRIVES:
            count, context, fed = count + 1, [*context, 0], [*fed, [5, 9, 11] * 13]
        some = {name: value[:count] for name, value in sampling.items()}  # type: ignore[index]
        found.append(runner.run([plan(context, fed, 3, **some)]).token_M.tolist())
        context = [c + len(new) for c, new in zip(context, fed, strict=True)]
    return found


DRAWN = {
    "temperature": np.array([0.0, 0.7, 1.5, 1.0, 0.3], np.float32),
    "top_p": np.array([1.0, 0.9, 1.0, 0.5, 1.0], np.float32),
    "top_k": np.array([0, 0, 40, 7, 1], np.int32),
    "min_p": np.array([0.0, 0.0, 0.05, 0.0, 0.0], np.float32),
    "answer": np.array([0, 1, 2, 3, 4], np.int32),
}


def check_static_steps(mesh: Mesh, settings: EngineConfig) -> None:
    started = start(DEMO, settings, mesh)
    rule = started.runner.rule  # longer prompts in expanded form
    for sampling in ({}, DRAWN):
        eager = Runner(started.runner.model, started.cache, rule)
        static = Runner(started.runner.model, started.cache, rule, static=True)
        assert answers(static, sampling) == answers(eager, sampling)
        steps = static._static
        assert steps is not None
        used = {(b.rows, b.samples) for b in steps._inputs}
        # All prompts; all sequences; the remaining ones; these with one more prompt.
        assert used == {(rows, bool(sampling)) for rows in (256, 8, 4, 64)}


CACHES = {
    "tokens": EngineConfig(kv_cache_size="2048tok", kv_shard="tokens"),
    "none": EngineConfig(kv_cache_size="2048tok", kv_shard="none"),
    "naive": EngineConfig(kv_cache_size="2048tok", attn_impl="naive"),
}


@pytest.mark.parametrize("cache", CACHES)
def test_static_steps_of_one_rank(cache: str) -> None:
    check_static_steps(alone(), CACHES[cache])


@pytest.mark.parametrize("cache", ["tokens", "none"])
def test_static_steps_of_two_ranks(cache: str) -> None:
    run_ranks(check_static_steps, 2, settings=CACHES[cache])


def test_padding_sees_and_writes_nothing() -> None:
    inputs = StaticBuffers(4, 16, CPU)
    table = np.array([[5, 6], [7, 0], [9, 1]], np.int32)
    longs = {
        "token": [11, -2, 13],
        "position": [70, 3, 65],
        "slot": [100, -1, 102],
        "next": [-2, 13, -1],
        "row": [0, 2],
        "predicted": [71, 66],
        "seed": [1, -2],
        "answer": [0, 7],
        "top_k": [0, 4],
        "draft_row": [2],
        "draft_result": [1],
        "draft_checked": [0],
    }
    floats = {"temperature": [0, 0.5], "top_p": [1, 0.9], "min_p": [0, 0.25]}
    arrays: dict[str, Any] = {name: np.array(v) for name, v in longs.items()}
    arrays |= {name: np.array(v, np.float32) for name, v in floats.items()}
    for _ in range(3):
        inputs.fill(table, **arrays)
        found = {name: inputs.row(name).tolist() for name in _ARRAYS}
        assert found == {
            "token": [11, -2, 13, 0],
            "position": [70, 3, 65, -1],
            "slot": [100, -1, 102, -1],
            "row": [0, 2, 0, 0],
            "predicted": [71, 66, 0, 0],
            "seed": [1, -2, 0, 0],
            "answer": [0, 7, 0, 0],
            "top_k": [0, 4, 0, 0],
            "temperature": [0, 0.5, 0, 0],
            "top_p": [1, np.float32(0.9), 0, 0],
            "min_p": [0, 0.25, 0, 0],
            "next": [-2, 13, -1, 0],
            "draft_row": [2, 0, 0, 0],
            "draft_result": [1, 0, 0, 0],
            "draft_checked": [0, -1, -1, -1],
        }
        assert inputs.page_TG[:, :2].tolist() == [[5, 6], [7, 0], [9, 1], [0, 0]]
        assert not inputs.page_TG[:, 2:].any()


def test_steps_with_adjusted_rows_run_eagerly() -> None:
    started = start(DEMO, EngineConfig(kv_cache_size="2048tok"), alone())
    steps = Runner(started.runner.model, started.cache, AbsorbRule(4), static=True)._static
    plain, adjusted = (plan([3], [[1]], 1) for _ in range(2))
    assert steps is not None and steps.bucket([plain, plain]) is not None
    row = AdjustedRow(0, NOT_FED, Adjuster(SamplingParams(presence_penalty=1.0), [1]), [1])
    adjusted.adjust = pack_adjustments([row])
    assert steps.bucket([adjusted]) is steps.bucket([plain, adjusted]) is None


def test_buckets() -> None:
    rows = [row_bucket(n) for n in range(1, MAX_ROWS + 1)]
    assert all(n <= b for n, b in enumerate(rows, 1)) and rows == sorted(rows)
    assert all(b - n <= max(3, n / 4) for n, b in enumerate(rows, 1))
    assert len(set(rows)) <= 24 and rows[0] == 1 and rows[7] == 8 and rows[-1] == MAX_ROWS
    assert [page_bucket(n) for n in (1, 16, 17, 64, 65, 2560)] == [16, 16, 32, 64, 128, 4096]


@pytest.fixture(scope="module")
def started() -> Started:
    return start(DEMO, EngineConfig(kv_cache_size="2048tok"), alone())


def test_what_runs_eagerly(started: Started) -> None:
    runner = Runner(started.runner.model, started.cache, AbsorbRule(1), static=True)
    steps = runner._static
    assert isinstance(steps, GraphRunner)
    assert steps.bucket([plan([3, 70], [[1], [2]], 2)]) == Bucket(2, 16, False)
    scored, likeliest = np.array([-1, 7], np.int32), np.array([-1, 0], np.int32)
    assert steps.bucket([plan([3, 70], [[1], [2] * 63], 3)]) == Bucket(64, 16, False)
    assert steps.bucket([plan([3, 0], [[1], [2] * 64], 1)]) == Bucket(128, 16, False)
    assert steps.bucket([plan([0], [[2] * (MAX_ROWS + 1)], 5)]) is None
    most = MAX_PROMPT_KEYS // 100 - 100
    assert steps.bucket([plan([most], [[2] * 100], 20)]) == Bucket(128, 32, False)
    assert steps.bucket([plan([most + 1], [[2] * 100], 20)]) is None
    assert steps.bucket([plan([most + 1] * 200, [[2]] * 200, 20)]) == Bucket(224, 32, False)
    for name, values in (("target", scored), ("top_logprobs", likeliest)):
        other = plan([3, 70], [[1], [2]], 2)
        setattr(other, name, values)
        assert steps.bucket([other]) is None
    many = plan([0] * (MAX_ROWS + 1), [[1]] * (MAX_ROWS + 1), 1)
    assert steps.bucket([many]) is None
    far = plan([3, 70], [[1], [-5000]], 2)
    assert steps.bucket([far]) is None
    assert torch.equal(steps._feed, torch.zeros_like(steps._feed))


def test_a_step_that_raises_leaves_no_lock(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is not zero would spoil all later sums of its weight."""
    model = started.runner.model
    modules = (m for m in model.modules() if isinstance(m, Linear | Router | VocabParallelHead))
    locks = [module.locks for module in modules]
    assert len(locks) > 4 * len(model.layers)
    for each in locks:
        each.fill_(1)
    monkeypatch.setattr(model, "logits", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        started.runner.run([plan([3], [[1]], 1)])
    assert not any(each.any() for each in locks)


def test_the_largest_steps_are_what_the_memory_plan_measures(started: Started) -> None:
    """All in two pages: sequences that decode beside a prompt, and a decode step of one bucket."""
    layout = started.cache.layout
    cache = CachePool(layout, 2, CPU, started.mesh.tp)
    runner = Runner(started.runner.model, cache, AbsorbRule(1), static=True)
    steps = runner._static
    assert isinstance(steps, GraphRunner)
    full = largest_step(3, 1300, layout.page_size, 40)
    assert StepShape.of_plan(full, 1) == StepShape(
        decode=3, context=433, prefill=37, cached=1300 - 37, rows=40
    )
    assert steps.bucket([full]) is None
    scored = runner.run([full])
    assert scored.scores is not None and len(scored.scores) == len(scored.token_M) == 40
    assert len(runner.run([largest_step(3, 20, layout.page_size, 40)]).token_M) == 23
    runner.run([largest_step(5, 1300, layout.page_size)])
    assert list(steps._inputs) == [Bucket(8, 32, True)]
    for groups in (1, 8, 12, 5000):
        most = most_rows(300, groups)
        fits = [row_bucket(n) * groups <= MAX_GATHERED and n <= MAX_ROWS for n in (most, most + 1)]
        assert fits == [groups < 5000, False]
    assert [most_rows(3, groups) for groups in (1, 32, 33, 5000)] == [64, 64, 4, 1]
