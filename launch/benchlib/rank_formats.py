"""Decode steps of one rank's share with weights in several formats, in turns in one process.

Steps in turns meet the same load of a shared machine, so their ratios hold where the times of
separate runs do not. All shares are in memory at the same time.
"""

import statistics
import time
from functools import partial

import torch

from benchlib.rank_share import Rank, RankShape
from benchlib.report import Report, Row
from benchlib.step_shape import StepKind
from dsv3.engine.runner import Runner
from dsv3.engine.step_plan import StepPlan

_WARM_UP = 2  # steps


def formats_report(
    shapes: list[RankShape], device: torch.device, batches: list[int], context: int, steps: int
) -> Report:
    """Measure decode steps of shares that differ in the format of weights.

    Args:
        shapes: the shares; ratios are to the first.
        device: a CPU.
        batches: sequences of the steps.
        context: cached tokens of each sequence.
        steps: timed steps of each format and batch.
    """
    positions = max(batches) * (context + 2 * max(64, shapes[0].world))
    ranks = [Rank(shape, device, positions) for shape in shapes]
    report = Report("rank", setting={"layers": ranks[0].config.num_hidden_layers, "steps": steps})
    for batch in batches:
        plans = [rank.usual_plan(StepKind(batch, context, 1)).plan for rank in ranks]
        runners = [rank.new_runner() for rank in ranks]
        seconds, busy = _time_in_turns(runners, plans, steps)
        for i, rank in enumerate(ranks):
            row: Row = {"batch": batch, "weights": rank.shape.weights}
            row |= {"GiB": rank.model.num_bytes / 2**30}
            row |= {"ms": 1e3 * statistics.median(seconds[i]), "best ms": 1e3 * min(seconds[i])}
            row |= {"tokens/s": batch / statistics.median(seconds[i])}
            for name, of, times in (
                ("x", statistics.median, seconds),
                ("best x", min, seconds),
                ("CPU x", statistics.median, busy),
                ("best CPU x", min, busy),
            ):
                row[name] = of(times[0]) / of(times[i])
            report.rows.append(row)
    report.notes.append(f"x: times as fast as {shapes[0].weights}; CPU: by time of the processor")
    return report


def _time_in_turns(
    runners: list[Runner], plans: list[StepPlan], steps: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Return each runner's seconds of every step, and the process's CPU seconds."""
    seconds: list[list[float]] = [[] for _ in runners]
    busy: list[list[float]] = [[] for _ in runners]
    for step in range(_WARM_UP + steps):
        for i, run in enumerate(
            partial(r.run, [plan]) for r, plan in zip(runners, plans, strict=True)
        ):
            start, busy_start = time.perf_counter(), time.process_time()
            run()
            if step >= _WARM_UP:
                busy[i].append(time.process_time() - busy_start)
                seconds[i].append(time.perf_counter() - start)
    return seconds, busy
