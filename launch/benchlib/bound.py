"""Bottleneck report of a step: each operation's measured time and its roofline floor."""

from collections import defaultdict
from collections.abc import Iterable

import torch

from benchlib.hardware import Hardware, hardware
from benchlib.operation import Op
from benchlib.profiler import Profiler, SpanTotal, profile
from benchlib.report import Report
from benchlib.roofline import RooflineSetup, step_ops
from dsv3.engine.start import Started
from dsv3.model.transformer import Transformer
from dsv3_kernels.fp8_format import FP8

Floors = dict[str, list[tuple[Op, int]]]


class Profile:
    """Measurement of a program run with --profile. Constructing one is a collective."""

    def __init__(self, name: str, started: Started) -> None:
        self._setup = setup_of(started)
        mesh = started.mesh
        fp32 = self._setup.weights == "fp32"
        self._hardware = hardware(name, mesh.device, mesh.tp, fp32=fp32)
        self._profiler = profile(started.runner)

    def report(self, run_seconds: float | None = None) -> Report:
        """Return the bottleneck report of all steps so far."""
        return bottleneck_report(self._profiler, self._setup, self._hardware, run_seconds)


def setup_of(started: Started) -> RooflineSetup:
    """Return the setup of a model that runs."""
    cached = started.cache.layout
    return RooflineSetup(
        config=started.config,
        layout=started.mesh.layout,
        weights=weight_format(started.runner.model),
        cache=cached.main.dtype,
        form=cached.form,
        kv_shard="tokens" if cached.paging.shards > 1 else "none",
    )


def weight_format(model: Transformer) -> str:
    """Return the storage format of the matrices, as in `RooflineSetup`; of several, the first."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for dtype, name in ((FP8, "fp8"), (torch.int8, "int8"), (torch.uint8, "int4")):
        if dtype in dtypes:
            return name
    plain = model.embed_tokens.table.weight.dtype
    return "fp32" if plain == torch.float32 else "bf16"


def bottleneck_report(
    profiler: Profiler, setup: RooflineSetup, ceilings: Hardware, run_seconds: float | None = None
) -> Report:
    """Compare the measured time of each operation with its floor, for a mean step.

    Args:
        profiler: holds the measured steps.
        setup: the model that ran, and its layout.
        ceilings: peak rates of the hardware.
        run_seconds: time of all steps as the engine measured it; the part spent outside the runner
            is reported as the host's.
    """
    steps = max(1, profiler.steps)
    total_seconds = profiler.step_seconds
    measured = dict(profiler.measured)
    if run_seconds is not None:
        measured["host"] = SpanTotal(max(0.0, run_seconds - total_seconds), steps)
        total_seconds = run_seconds
    floors = assign_ops(
        measured, ((step_ops(setup, shape), n) for shape, n in profiler.shapes.items())
    )
    report = Report("profile", setting={"hardware": ceilings.name, "steps": profiler.steps})
    report.setting |= {"weights": setup.weights, "cache": setup.cache}
    total_floor = 0.0
    for name, span in sorted(measured.items(), key=lambda item: -item[1].seconds):
        seconds_by_bound = defaultdict[str, float](float)
        for op, count in floors[name]:
            seconds_by_bound[op.bound(ceilings)] += count * op.seconds(ceilings)
        floor = sum(seconds_by_bound.values())
        bound = max(seconds_by_bound, key=lambda kind: seconds_by_bound[kind], default="-")
        total_floor += floor
        row = {
            "operation": name,
            "calls": round(span.count / steps, 1),
            "ms": 1e3 * span.seconds / steps,
            "share %": 100 * span.seconds / max(total_seconds, 1e-12),
            "floor ms": 1e3 * floor / steps,
            "% of roof": share_of_roof(floor, span.seconds),
            "MB": sum(n * op.count * op.bytes for op, n in floors[name]) / steps / 1e6,
            "GFLOP": sum(n * op.count * op.flops for op, n in floors[name]) / steps / 1e9,
            "bound by": bound,
        }
        report.rows.append(row)
    report.notes.append(
        f"operations add up to {sum(row['ms'] for row in report.rows):.4g} ms, a step takes "
        f"{1e3 * total_seconds / steps:.4g} ms; its floor is {1e3 * total_floor / steps:.4g} ms; "
        f"most time is spent in {report.rows[0]['operation'] if report.rows else 'nothing'}"
    )
    return report


def share_of_roof(floor: float, seconds: float) -> float | str:
    """Return floor / measured time in %, or "in cache" for an operation faster than its floor.

    Read bandwidth is measured on more bytes than any cache holds, so an operation whose operands
    stay in a cache can beat its floor.
    """
    return "in cache" if floor > seconds else 100 * floor / max(seconds, 1e-12)


def assign_ops(names: Iterable[str], steps: Iterable[tuple[list[Op], int]]) -> Floors:
    """Assign each operation to the longest measured name that is a dotted prefix of its own."""
    measured_names = set(names)
    floors = defaultdict[str, list[tuple[Op, int]]](list)
    for ops, count in steps:
        for op in ops:
            parts = op.name.split(".")
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            name = next((prefix for prefix in prefixes if prefix in measured_names), "step")
            floors[name].append((op, count))
    return floors
