"""What bounds a step: measured time of every operation beside the least it could take."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch

from benchlib.hardware import hardware
from benchlib.profiler import Measured, Profiler, profile
from benchlib.report import Report
from benchlib.roofline import Hardware, Op, Setup, step_ops
from dsv3.engine.start import Started
from dsv3.model.transformer import Transformer
from dsv3.parallel.weights import FP8
from dsv3.settings import KvShard

Floors = dict[str, list[tuple[Op, int]]]


class Profile:
    """What a program run with --profile measures. Made on all ranks: measuring is a collective."""

    def __init__(self, name: str, started: Started) -> None:
        mesh, cached = started.mesh, started.cache.layout
        self._hardware = hardware(name, mesh.device, mesh.tp)
        kv_shard: KvShard = "tokens" if cached.shards > 1 else "none"
        self._setup = Setup(
            config=started.config,
            layout=mesh.layout,
            weights=weight_format(started.runner.model),
            cache=cached.dtype,
            form=cached.form,
            kv_shard=kv_shard,
        )
        self._profiler = profile(started.runner)

    def report(self, run_seconds: float | None = None) -> Report:
        """Tell what bounded the steps so far."""
        return what_bounds(self._profiler, self._setup, self._hardware, run_seconds)


def weight_format(model: Transformer) -> str:
    """Return the format that holds the matrices: "fp8", "bf16" or "fp32"."""
    if any(p.dtype == FP8 for p in model.parameters()):
        return "fp8"
    plain = model.embed_tokens.table.weight.dtype
    return "fp32" if plain == torch.float32 else "bf16"


def what_bounds(
    profiler: Profiler, setup: Setup, ceilings: Hardware, run_seconds: float | None = None
) -> Report:
    """Lay measured times beside their floors, a mean step.

    Args:
        profiler: with the steps measured.
        setup: what ran.
        ceilings: of the hardware.
        run_seconds: all the steps' time as the engine saw it; what the runner did not spend of it
            is the host's.
    """
    steps, whole = max(1, profiler.steps), profiler.step_seconds
    measured = dict(profiler.measured)
    if run_seconds is not None:
        measured["host"] = Measured(max(0.0, run_seconds - whole), steps)
        whole = run_seconds
    floors = lay_beside(
        measured, ((step_ops(setup, load), n) for load, n in profiler.shapes.items())
    )
    report = Report("profile", setting={"hardware": ceilings.name, "steps": profiler.steps})
    report.setting |= {"weights": setup.weights, "cache": setup.cache}
    least = 0.0
    for name, found in sorted(measured.items(), key=lambda item: -item[1].seconds):
        by = Counter[str]()
        for op, count in floors[name]:
            by[op.bound(ceilings)] += count * op.seconds(ceilings)  # type: ignore[assignment]
        least += by.total()
        row = {
            "operation": name,
            "calls": round(found.count / steps, 1),
            "ms": 1e3 * found.seconds / steps,
            "share %": 100 * found.seconds / max(whole, 1e-12),
            "floor ms": 1e3 * by.total() / steps,
            "% of roof": share_of_roof(by.total(), found.seconds),
            "MB": sum(n * op.count * op.bytes for op, n in floors[name]) / steps / 1e6,
            "GFLOP": sum(n * op.count * op.flops for op, n in floors[name]) / steps / 1e9,
            "bound by": by.most_common(1)[0][0] if by else "-",
        }
        report.rows.append(row)
    report.notes.append(
        f"operations add up to {sum(row['ms'] for row in report.rows):.4g} ms, a step takes "
        f"{1e3 * whole / steps:.4g} ms; its floor is {1e3 * least / steps:.4g} ms; most of it "
        f"goes to {next((row['operation'] for row in report.rows), 'nothing')}"
    )
    return report


def share_of_roof(floor: float, seconds: float) -> float | str:
    """Return how much of a roof is reached, in %.

    The roof of memory is measured on more than any cache holds. Where the operands of a smaller
    operation stay in a cache, it may be faster than its floor.
    """
    return "in cache" if floor > seconds else 100 * floor / max(seconds, 1e-12)


def lay_beside(names: Iterable[str], steps: Iterable[tuple[list[Op], int]]) -> Floors:
    """Give every operation of every step to the longest measured name that it lies below."""
    known, floors = set(names), defaultdict[str, list[tuple[Op, int]]](list)
    for ops, count in steps:
        for op in ops:
            parts = op.name.split(".")
            heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            floors[next((name for name in heads if name in known), "step")].append((op, count))
    return floors
