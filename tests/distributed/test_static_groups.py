"""Decode steps on static buffers in several data-parallel groups: one rank's answers, idle or not.

What runs here without a graph is what a graph holds; `tests/kernels/test_captured_step.py` sees to
it that the host reads no device value meanwhile.
"""

import pytest
import torch

from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO
from dsv3.distributed.mesh import Mesh, make_mesh
from dsv3.engine.cuda_graphs import MAX_GATHERED, Bucket, GraphRunner
from dsv3.engine.engine import Engine, follow
from dsv3.engine.start import Started, start
from dsv3.engine.step_plan import StepPlan
from dsv3.request import Request, SamplingParams
from dsv3.settings import EngineConfig
from tests.distributed.ranks import CPU, alone, run_ranks
from tests.distributed.test_static import plan

# Prompt and answer of each request; the first one is alone at the beginning, the last one at the
# end, and in between the groups have unequal numbers of sequences.
ASKED = ((30, 12), (7, 3), (100, 6), (1, 16), (64, 2), (3, 5), (9, 4))
CACHE = {"kv_cache_size": "1024tok", "max_seq_len": 256}
Answers = dict[str, list[int]]


def ask(engine: Engine) -> Answers:
    """Return the answers; every other one is drawn."""
    answers: Answers = {}
    requests = []
    for i, (prompt, answer) in enumerate(ASKED):
        drawn = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 2 else {}
        params = SamplingParams(max_tokens=answer, ignore_eos=True, **drawn)
        ids = [(17 * i + 29 * j) % 1999 for j in range(prompt)]
        requests.append(Request(request_id=str(i), prompt_ids=ids, params=params))
    engine.add(requests[0])
    outputs = [out for _ in range(4) for out in engine.step()]
    for request in requests[1:]:
        engine.add(request)
    while outputs or engine.has_work():
        done = (out.completion for out in outputs if out.completion is not None)
        answers |= {each.request_id: each.token_ids for each in done}
        outputs = engine.step()
    engine.stop()
    return answers


def watched(started: Started) -> list[tuple[Bucket, int]]:
    """Make a runner use static buffers; return a list that will hold its steps."""
    runner, seen = started.runner, []
    steps = GraphRunner(runner.model, started.cache, runner.sampler)  # type: ignore[arg-type]
    run = steps.run

    def recorded(bucket: Bucket, mine: StepPlan, *tables: object) -> object:
        seen.append((bucket, len(mine.row)))
        return run(bucket, mine, *tables)  # type: ignore[arg-type]

    steps.run, runner._static = recorded, steps  # type: ignore[assignment, method-assign]
    return seen


def regrouped(world: Mesh, dp: int, hosts: int = 1) -> Mesh:
    size = world.world.size
    layout = ParallelConfig(world_size=size, rank=world.world.rank, dp=dp)
    return make_mesh(layout, CPU, "gloo", False, [r * hosts // size for r in range(size)])


def check_groups(world: Mesh, cases: list[tuple[int, int, dict[str, object]]], want: Answers):
    for dp, hosts, settings in cases:
        mesh = regrouped(world, dp, hosts)
        assert (mesh.hosts.size > 1) == (hosts > 1)
        started = start(DEMO, EngineConfig(**CACHE, **settings), mesh)
        seen = watched(started)
        if started.engine is None:
            follow(started.runner, started.channel)
        else:
            assert ask(started.engine) == want, (dp, hosts, settings)
        idle = sum(count == 0 for _, count in seen)
        padded = sum(0 < count < bucket.rows for bucket, count in seen)
        idle, padded = mesh.world.all_reduce(torch.tensor([idle, padded])).tolist()
        assert len(seen) > 12 and idle > 0 and padded > 0, (dp, len(seen), idle, padded)
        mesh.close()


def check_failure(world: Mesh, want: Answers) -> None:
    """A step that one rank cannot capture runs eagerly on all."""
    mesh = regrouped(world, 2)
    started = start(DEMO, EngineConfig(**CACHE), mesh)
    watched(started)
    steps = started.runner._static
    assert steps is not None

    def capture(*_: object) -> None:
        if mesh.world.rank == 1:
            raise RuntimeError("no room")

    steps._pool, steps._capture = "a GPU's", capture  # type: ignore[assignment, method-assign]
    if started.engine is None:
        follow(started.runner, started.channel)
    else:
        assert ask(started.engine) == want
    assert steps._failed == {False, True}
    mesh.close()


@pytest.fixture(scope="module")
def want() -> Answers:
    started = start(DEMO, EngineConfig(**CACHE), alone())
    assert started.engine is not None
    return ask(started.engine)


FORMS = ({"moe_dispatch": "allreduce"}, {"moe_dispatch": "alltoall", "pipeline_depth": 1})
COPIES = {"redundant_experts": 4, "rebalance_every": 4}


def test_two_groups(want: Answers) -> None:
    run_ranks(check_groups, 2, [(2, 1, form) for form in FORMS], want)


def test_what_one_rank_cannot_capture_no_rank_replays(want: Answers) -> None:
    run_ranks(check_failure, 2, want)


def test_four_ranks(want: Answers) -> None:
    """Groups of one and of two, on one host and on two, experts that move meanwhile."""
    cases = [
        (4, 1, {"moe_dispatch": "alltoall", **COPIES}),
        (4, 2, {"moe_dispatch": "alltoall", "pipeline_depth": 1}),
        (2, 1, {"pipeline_depth": 1}),
        (2, 2, {"moe_dispatch": "alltoall", "kv_shard": "none"}),
    ]
    run_ranks(check_groups, 4, cases, want)


def test_all_groups_take_one_bucket() -> None:
    """That of the fullest group and the longest sequence; none if any group does more."""
    started = start(DEMO, EngineConfig(**CACHE), alone())
    steps = GraphRunner(started.runner.model, started.cache, started.runner.sampler)  # type: ignore[arg-type]
    few, far, idle = plan([3], [[1]], 1), plan([3] * 4 + [1200], [[1]] * 5, 20), StepPlan()
    assert steps.bucket([few, idle]) == Bucket(1, 16, False)
    assert steps.bucket([idle, few, far]) == Bucket(8, 32, False)
    assert steps.bucket([idle, idle]) is None
    drawing = plan([3], [[1]], 1)
    drawing.temperature += 1
    assert steps.bucket([idle, few, drawing]) == Bucket(1, 16, True)
    assert steps.bucket([few, plan([3], [[1, 2]], 1)]) is None
    groups = MAX_GATHERED // 8
    assert steps.bucket([far] * groups) == Bucket(8, 32, False)
    assert steps.bucket([far] * (groups + 1)) is None
