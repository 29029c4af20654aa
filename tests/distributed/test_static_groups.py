"""Short steps on static buffers in several data-parallel groups: one rank's answers, idle or not.

What runs here without a graph is what a graph holds; `tests/kernels/test_captured_step.py` sees to
it that the host reads no device value meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO
from dsv3.distributed.mesh import Mesh, make_mesh
from dsv3.engine import cuda_graphs
from dsv3.engine.cuda_graphs import MAX_GATHERED, Bucket, GraphRunner
from dsv3.engine.engine import Engine, follow
from dsv3.engine.start import Started, start
from dsv3.engine.static_buffers import StaticBuffers
from dsv3.engine.step_plan import StepPlan
from dsv3.request import Request, SamplingParams
from dsv3.settings import EngineConfig
from tests.distributed.ranks import CPU, Check, Outcomes, alone, run_checks
from tests.distributed.test_static import plan

# Prompt and answer of each request; the first one is alone at the beginning, the last one at the
# end, and in between the groups have unequal numbers of sequences.
ASKED = ((30, 12), (7, 3), (100, 6), (1, 16), (64, 2), (3, 5), (9, 4))
CACHE = EngineConfig(kv_cache_size="1024tok", max_seq_len=256)
Answers = dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Data-parallel groups, hosts, and settings that differ from `CACHE`."""

    dp: int
    hosts: int = 1
    settings: dict[str, Any]


def ask(engine: Engine) -> Answers:
    """Return the answers; every other one is drawn."""
    answers: Answers = {}
    requests = []
    for i, (prompt, answer) in enumerate(ASKED):
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        if i % 2:
            params = replace(params, temperature=0.8, top_p=0.9, seed=i)
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
    runner = started.runner
    seen: list[tuple[Bucket, int]] = []
    steps = GraphRunner(runner.model, started.cache, runner.sampler, runner.rule)  # type: ignore[arg-type]
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


def check_groups(world: Mesh, case: Case, want: Answers) -> None:
    """The groups of a layout answer as one rank does."""
    mesh = regrouped(world, case.dp, case.hosts)
    assert (mesh.hosts.size > 1) == (case.hosts > 1)
    started = start(DEMO, replace(CACHE, **case.settings), mesh)
    seen = watched(started)
    if started.engine is None:
        follow(started.runner, started.channel)
    else:
        assert ask(started.engine) == want
    num_idle = sum(count == 0 for _, count in seen)
    num_padded = sum(0 < count < bucket.rows for bucket, count in seen)
    idle, padded = mesh.world.all_reduce(torch.tensor([num_idle, num_padded])).tolist()
    assert len(seen) > 12 and idle > 0 and padded > 0, (len(seen), idle, padded)
    mesh.close()


class Rerun:
    """Stands for a graph: runs the step that it holds."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self.compute, self.num_replays = compute, 0

    def replay(self) -> None:
        self.compute()
        self.num_replays += 1


def check_failure(world: Mesh, want: Answers) -> None:
    """Steps that one rank cannot capture run eagerly on all; later ones of other sizes do not."""
    mesh = regrouped(world, 2)
    started = start(DEMO, CACHE, mesh)
    watched(started)
    steps, lines = started.runner._static, []
    assert steps is not None

    def capture(bucket: Bucket, inputs: StaticBuffers) -> Rerun:
        if mesh.world.rank == 1 and bucket.rows == 1:
            raise RuntimeError("no room\nat some line of torch")
        return Rerun(partial(steps._compute, bucket, inputs))

    steps._pool, steps._capture = "a GPU's", capture  # type: ignore[assignment, method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs.log, "warning", lambda text, *values: lines.append(text % values))
        if started.engine is None:
            follow(started.runner, started.channel)
        else:
            assert ask(started.engine) == want
    assert {bucket.rows for bucket in steps._failed} == {1}
    sizes = {bucket.rows for bucket in steps._graphs}
    assert len(sizes) > 1 and 1 not in sizes, sizes
    assert sum(graph.num_replays for graph in steps._graphs.values()) > 0  # type: ignore[attr-defined]
    assert len(lines) == (0 if mesh.world.rank else len(steps._failed))
    reason = "tokens and 16 pages a sequence run eagerly: their CUDA graph cannot be captured: "
    assert all(f"{reason}rank 1: capturing: RuntimeError: no room" in line for line in lines)
    assert not any("\n" in line for line in lines)
    mesh.close()


@pytest.fixture(scope="module")
def want() -> Answers:
    started = start(DEMO, CACHE, alone())
    assert started.engine is not None
    return ask(started.engine)


# Ranks -> name of the case -> layout and settings.
CASES = {
    2: {
        "allreduce": Case(dp=2, settings={"moe_dispatch": "allreduce"}),
        "alltoall": Case(dp=2, settings={"moe_dispatch": "alltoall", "pipeline_depth": 1}),
    },
    4: {
        "4 groups, experts move": Case(
            dp=4,
            settings={"moe_dispatch": "alltoall", "redundant_experts": 4, "rebalance_every": 4},
        ),
        "4 groups on 2 hosts": Case(
            dp=4, hosts=2, settings={"moe_dispatch": "alltoall", "pipeline_depth": 1}
        ),
        "2 groups": Case(dp=2, settings={"pipeline_depth": 1}),
        "2 groups on 2 hosts": Case(
            dp=2, hosts=2, settings={"moe_dispatch": "alltoall", "kv_shard": "none"}
        ),
    },
}


@pytest.fixture(scope="module")
def outcomes_of(want: Answers) -> Callable[[int], Outcomes]:
    """The checks of a world size, run once."""

    def run(size: int) -> Outcomes:
        checks: dict[str, Check] = {
            name: partial(check_groups, case=case, want=want) for name, case in CASES[size].items()
        }
        if size == 2:
            checks["capture fails"] = partial(check_failure, want=want)
        return run_checks(checks, size)

    return cache(run)


@pytest.mark.parametrize(
    ("size", "case"), [(size, name) for size, cases in CASES.items() for name in cases]
)
def test_groups_answer_as_one_rank(
    outcomes_of: Callable[[int], Outcomes], size: int, case: str
) -> None:
    outcomes_of(size).verify(case)


def test_a_step_that_one_rank_cannot_capture_is_eager_on_all(
    outcomes_of: Callable[[int], Outcomes],
) -> None:
    outcomes_of(2).verify("capture fails")


def test_all_groups_take_one_bucket() -> None:
    """The bucket fits the fullest group and the longest sequence; none if any group does more."""
    started = start(DEMO, CACHE, alone())
    runner = started.runner
    steps = GraphRunner(runner.model, started.cache, runner.sampler, runner.rule)  # type: ignore[arg-type]
    few = plan([3], [[1]], 1)
    far = plan([3] * 4 + [1200], [[1]] * 5, 20)
    idle = StepPlan()
    assert steps.bucket([few, idle]) == Bucket(1, 16, False)
    assert steps.bucket([idle, few, far]) == Bucket(8, 32, False)
    assert steps.bucket([idle, idle]) is None
    drawing = plan([3], [[1]], 1)
    drawing.temperature += 1
    assert steps.bucket([idle, few, drawing]) == Bucket(1, 16, True)
    assert steps.bucket([few, plan([3], [[1, 2]], 1)]) == Bucket(64, 16, False)
    assert steps.bucket([few, plan([3], [[1] * 300], 5)]) is None
    groups = MAX_GATHERED // 8
    assert steps.bucket([far] * groups) == Bucket(8, 32, False)
    assert steps.bucket([far] * (groups + 1)) is None
