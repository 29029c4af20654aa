"""Steps of one rank of a large model: their times as served, by operation and by kernel."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchlib.bound import bottleneck_report
from benchlib.hardware import Hardware
from benchlib.kernel_timing import busy_and_idle, kernel_events, kernel_table
from benchlib.operation import floor_seconds
from benchlib.profiler import Clock, Profiler, hold, profile
from benchlib.rank_share import Rank
from benchlib.report import Row
from benchlib.roofline import step_ops
from benchlib.step_shape import StepKind
from dsv3.config import ModelConfig
from dsv3.engine.step_plan import StepPlan

_WARM_UP = 3  # steps that compile and capture


@dataclass(frozen=True, slots=True)
class StepResult:
    """The measurement of a step.

    Attributes:
        rows: a row for each operation.
        notes: lines about the step.
        figures: the step's figures by name; figures of kernels only on a GPU.
        kernels: a row for each kernel of a step as served; none on a CPU.
    """

    rows: list[Row]
    notes: list[str]
    figures: Row
    kernels: list[Row]


def time_steps(
    run: Callable[[list[StepPlan]], object],
    plans: list[list[StepPlan]],
    device: torch.device,
    rounds: int,
) -> tuple[float, float]:
    """Return the median seconds of a step in a row of steps, and the median seconds to launch one.

    Args:
        run: runs a step.
        plans: the steps of a round.
        device: device that runs them.
        rounds: number of timed rounds.
    """
    clock = Clock(device)
    step_seconds: list[float] = []
    launch_seconds: list[float] = []
    for _ in range(_WARM_UP + rounds):
        launch_start = time.perf_counter()
        begin = clock.mark()
        run(plans[0])
        launch_seconds.append(time.perf_counter() - launch_start)
        for plan in plans[1:]:
            run(plan)
        end = clock.mark()
        clock.wait()
        step_seconds.append(clock.seconds(begin, end) / len(plans))
    return statistics.median(step_seconds[_WARM_UP:]), statistics.median(launch_seconds[_WARM_UP:])


def profile_steps(rank: Rank, plan: StepPlan, steps: int) -> Profiler:
    """Measure each operation of eager steps; a GPU is kept busy while the host launches a step."""
    runner = rank.new_runner(eager=True)
    profiler = profile(runner)
    for i in range(1 + min(steps, 5)):
        if i == 1:  # the first step compiles and warms up
            profiler.clear()
        hold(rank.device)
        runner.run([plan])
    profiler.detach()
    return profiler


def measure_step(
    rank: Rank, name: str, kind: StepKind, ceilings: Hardware, steps: int, eager: bool
) -> StepResult:
    """Measure one kind of step: as it is served, operation by operation, and kernel by kernel.

    Args:
        rank: the share.
        name: the step in reports.
        kind: the step.
        ceilings: peak rates of the device; exchanges only count the bytes that stand-ins move.
        steps: number of timed steps.
        eager: run without CUDA graphs.
    """
    drawn = rank.usual_plan(kind)
    plan, hits = drawn.plan, drawn.hits
    served = rank.new_runner(eager)
    on_gpu = rank.device.type == "cuda"
    profiler = profile_steps(rank, plan, steps)
    # Several in a row, as in serving: the host launches one while the device runs another.
    ready = [[plan] for _ in range(4 if on_gpu else 1)]
    seconds, launch = time_steps(served.run, ready, rank.device, steps)
    shape = replace(next(iter(profiler.shapes)), hits=hits)
    profiler.shapes = Counter({shape: profiler.steps})
    local = replace(ceilings, link=math.inf, net=math.inf, link_latency=0.0, net_latency=0.0)
    rows = bottleneck_report(profiler, rank.setup, local).rows
    ops = step_ops(rank.setup, shape)
    floor = floor_seconds(ops, local)
    tokens = kind.num_tokens
    token_mb = sum(op.count * op.bytes for op in ops) / tokens / 1e6
    figures: Row = {"ms": 1e3 * seconds, "floor ms": 1e3 * floor, "launch us": 1e6 * launch}
    figures |= {"tokens/s": tokens / seconds, "MB a token": token_mb}
    figures |= {"experts hit": hits.experts, "entries": hits.rows}
    note = (
        f"{name}: {1e3 * seconds:.4g} ms a step, floor {1e3 * floor:.4g} ms "
        f"({100 * floor / seconds:.3g} % of the roof), launched in {1e6 * launch:,.0f} us; its "
        f"operations one by one {1e3 * profiler.step_seconds / profiler.steps:.4g} ms; "
        f"{hits.experts:.1f} local experts hit by {hits.rows:.1f} entries; "
        f"{tokens / seconds:.4g} tokens/s, {token_mb:,.4g} MB read and written a token"
    )
    events = kernel_events(lambda: served.run([plan])) if on_gpu else []
    if events:
        busy, idle = busy_and_idle([(event.begin, event.end) for event in events])
        figures |= {"kernels": len(events), "busy ms": 1e3 * busy, "gaps ms": 1e3 * idle}
        note += f"; {len(events)} kernels busy {1e3 * busy:.4g} ms, gaps {1e3 * idle:.4g} ms"
    notes = [note]
    factor = all_layers_factor(rank, rows)
    if factor != 1:
        layers = rank.shape.config.num_hidden_layers
        all_ms = 1e3 * seconds * factor
        notes.append(f"{name}, all {layers} layers at the same rates: {all_ms:.4g} ms")
    rows = [{"step": name, **row} for row in rows]
    return StepResult(rows, notes, figures, kernel_table(events))


def all_layers_factor(rank: Rank, rows: list[Row]) -> float:
    """Return the step time of the full model over that of the kept layers.

    Each layer of the full model counts as long as the measured layers of its kind.
    """
    total = _modules_by_kind(rank.shape.config)
    kept = _modules_by_kind(rank.config)
    factor = {kind: count / max(1, kept[kind]) for kind, count in total.items()}
    longer = sum(row["ms"] * factor.get(row["operation"].split(".")[0], 1.0) for row in rows)
    return float(longer / sum(row["ms"] for row in rows))


def _modules_by_kind(config: ModelConfig) -> dict[str, int]:
    num_layers = config.num_hidden_layers
    num_moe = sum(config.is_moe_layer(i) for i in range(num_layers))
    return {
        "layers": num_layers,
        "self_attn": num_layers,
        "moe": num_moe,
        "mlp": num_layers - num_moe,
    }
