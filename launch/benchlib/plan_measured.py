"""Step times on this machine: measured, and predicted from measured rates."""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median

import numpy as np
import torch
import yaml

from benchlib.bound import setup_of
from benchlib.hardware import HARDWARE_FILE, Hardware, hardware
from benchlib.layouts import Layout
from benchlib.report import Report
from benchlib.step_shape import StepKind, StepShape
from common import start_model
from dsv3.engine.engine import follow
from dsv3.engine.start import Started
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.files import NamedFile, write_output
from program import join_engine_ranks

_REPEATS = 30
# Steps to measure. Every other one is used to fit the rates, the others to check the prediction.
CHECKED = (
    StepKind(1, 64, 1),
    StepKind(2, 64, 1),
    StepKind(8, 64, 1),
    StepKind(64, 64, 1),
    StepKind(32, 256, 1),
    StepKind(8, 1000, 1),
    StepKind(1, 0, 64),
    StepKind(1, 0, 256),
    StepKind(1, 0, 1000),
)
RATES = ("read", "fp8", "bf16", "fp32", "link", "net")
MEASURED = ("read", "fp32", "bf16", "link", "link_latency")


def least_seconds(run: Callable[[], object], device: torch.device, alone: bool) -> float:
    """Return the least time of a call after a warm-up call; other processes only add to a time.

    A CPU rank that runs `alone`, without waiting for other ranks, is timed in CPU time: on a busy
    machine, other processes interrupt every long call.
    """
    clock = time.thread_time if alone and device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(_REPEATS):
        begin = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - begin)
    return min(times[1:])


def measured_plan(args: argparse.Namespace) -> Report | None:
    """Measure the machine and compare predicted with measured steps; rank 0 returns the report."""
    if args.hardware is not None or args.figure:
        raise ConfigError("--measure finds its own figures; leave --hardware and --figure out")
    with join_engine_ranks(args) as mesh:
        started = start_model(args, mesh)
        free_bytes = float(started.plan.free_bytes)
        ceilings = hardware("measure", mesh.device, mesh.world, free_bytes, fp32=True)
        ceilings = replace(ceilings, ranks_per_host=mesh.ranks_on_host)
        if started.engine is None:
            follow(started.runner, started.channel)
            return None
        try:
            dispatch = "allreduce" if args.moe_dispatch == "allreduce" else "alltoall"
            report, fitted = check_steps(started, ceilings, dispatch)
        finally:
            started.engine.stop()
        if args.save_hardware:
            figures = asdict(fitted) | {"ranks": mesh.layout.world_size}
            file = NamedFile("--save-hardware", args.save_hardware)
            write_output(file, HARDWARE_FILE, yaml.safe_dump(figures, sort_keys=False))
        report.setting = {name: f"{getattr(ceilings, name):.3g}" for name in MEASURED}
        report.setting["ranks"] = mesh.layout.world_size
        return report


def fit(rows: np.ndarray) -> tuple[float, float]:
    """Fit slowdown * floor + launch * count = time with the least relative error.

    Args:
        rows: [3, steps]: floor in seconds, number of operations, measured seconds.

    Returns:
        slowdown, at least 1, and launch, the seconds added to each operation, above 0.
    """
    floor = rows[0] / rows[2]
    count = rows[1] / rows[2]
    ones = np.ones(rows.shape[1])
    solution = np.linalg.lstsq(np.stack([floor, count], 1), ones, rcond=None)[0]
    slowdown, launch = solution.tolist()
    if launch <= 0:
        slowdown = float(floor @ ones / (floor @ floor))
    if slowdown < 1:
        launch = float(count @ (ones - floor) / (count @ count))
    return max(slowdown, 1.0), max(launch, 1e-9)


def check_steps(started: Started, hw: Hardware, dispatch: str) -> tuple[Report, Hardware]:
    """Compare predicted with measured step times, on rank 0; the other ranks follow.

    The model of a step's time is slowdown * floor + launch * operations. Every other step is used
    to fit the two; the times of the steps between are predicted. All dp groups run the same plan.

    Returns:
        the report, and the hardware with the fitted rates.
    """
    layout = Layout(setup_of(started), dispatch)
    page_size = started.cache.layout.page_size
    shapes: list[StepShape] = []
    measured: list[float] = []
    for kind in CHECKED:
        plan = kind.plan(np.zeros(kind.num_tokens, np.int32), page_size)
        if len(plan.pages) > started.cache.num_usable_pages:
            raise ConfigError(
                "the cache is too small for these steps; give --kv-cache-size 16384tok"
            )
        plans = [plan] * started.mesh.layout.dp

        def step(plans: list[StepPlan] = plans) -> None:
            started.channel.send(plans)
            started.runner.run(plans).to_host()

        shapes.append(
            StepShape(decode=kind.batch, context=kind.context)
            if kind.is_decode
            else StepShape(prefill=kind.num_tokens)
        )
        measured.append(least_seconds(step, started.mesh.device, started.mesh.world.size == 1))
    floors = [layout.seconds(shape, replace(hw, launch=0.0)) for shape in shapes]
    counts = [sum(op.count for op in layout.ops(shape)) for shape in shapes]
    slowdown, launch = fit(np.array([floors, counts, measured])[:, ::2])
    rates = {name: getattr(hw, name) / slowdown for name in RATES}
    hw = replace(hw, launch=launch, **rates)
    report = Report("plan --measure")
    for i, kind in enumerate(CHECKED):
        predicted = layout.seconds(shapes[i], hw)
        is_predicted = i % 2 == 1
        report.rows.append(
            {
                "step": f"{kind.batch} x {kind.new} after {kind.context}",
                "floor ms": 1e3 * floors[i],
                "predicted ms": 1e3 * predicted if is_predicted else None,
                "measured ms": 1e3 * measured[i],
                "error %": 100 * (predicted / measured[i] - 1) if is_predicted else None,
            }
        )
    errors = [abs(row["error %"]) for row in report.rows[1::2]]
    report.notes = [
        f"the steps without an error were fitted: {1 / slowdown:.0%} of the measured rates, "
        f"{1e6 * hw.launch:.3g} us added to every operation",
        f"error of the others: {median(errors):.0f} % in the median, {max(errors):.0f} % at most",
    ]
    return report, hw
