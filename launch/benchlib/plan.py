"""Compare the layouts of a model: memory and step time, computed or measured on this machine.

    python launch/bench.py plan --config v3-671b --hardware h200x8 --batch 128 --context 4096
    python launch/bench.py plan --config v3-671b --hardware a100x8 --weights int4
    python launch/bench.py plan --config v3-671b --hardware FILE.yaml --figure link=2e11
    torchrun --nproc-per-node 2 launch/bench.py plan --measure --save-hardware FILE.yaml

With --measure, step times of a model (without --ckpt-path: the demo model) are predicted from the
measured bandwidth of memory and links and the measured speed of matrix products, and compared with
measured times.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchlib.flags import at_least
from benchlib.hardware import HARDWARE_FILE, Hardware, read_hardware
from benchlib.layouts import Layout, layouts, memory
from benchlib.operation import Op
from benchlib.plan_measured import measured_plan
from benchlib.random_weights import INTEGERS
from benchlib.report import Report, Row
from benchlib.roofline import RooflineSetup
from benchlib.step_shape import StepShape
from dsv3.config import ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.launcher import environment_world_size
from dsv3.engine.locate import locate_description
from dsv3.errors import ConfigError
from dsv3.files import NamedFile, check_output


def _computed_plan(args: argparse.Namespace) -> Report:
    """Compare all layouts from hardware figures alone; no model is loaded."""
    if args.hardware is None:
        raise ConfigError("give --hardware (h200x8, h800x16, FILE), or --measure this machine")
    if args.save_hardware:
        raise ConfigError("--save-hardware writes the figures of --measure; give both or neither")
    config = load_model_config(args.config or locate_description(args.ckpt_path))
    ceilings, ranks = read_hardware(args.hardware, dict(args.figure))
    weights = "fp8" if config.quantization and args.dtype in ("auto", "fp8") else "bf16"
    weights = "fp32" if args.dtype == "float32" else weights
    weights = args.weights if args.weights in INTEGERS else weights
    cache = args.kv_dtype
    if cache == "auto":
        cache = "fp32" if weights == "fp32" else "bf16"
    model = RooflineSetup(config=config, layout=ParallelConfig(), weights=weights, cache=cache)
    report = rank_layouts(model, ranks, ceilings, args.batch, args.context, args.prefill)
    flags = ("hardware", "batch", "context", "prefill")
    report.setting = {name: getattr(args, name) for name in flags}
    report.setting |= {"weights": weights, "cache": cache}
    report.is_computed = True
    return report


def rank_layouts(
    model: RooflineSetup, ranks: int, hw: Hardware, batch: int, context: int, prefill: int
) -> Report:
    """Compare all layouts, the fastest that fits first.

    Args:
        model: the model in any layout.
        ranks: number of ranks.
        hw: device and links of one rank.
        batch: decoding sequences, all dp groups together.
        context: cached positions of each sequence.
        prefill: prompt tokens of a prefill step, all dp groups together.

    Raises:
        ConfigError: no layout splits the model.
    """
    candidates: list[_Candidate] = []
    for layout in layouts(model, ranks):
        place = layout.setup.layout
        weights, cache_tokens = memory(layout.setup, hw)
        decode_seconds, prefill_seconds = (
            layout.seconds(shape, hw) for shape in shapes_of(place, batch, context, prefill)
        )
        fits = cache_tokens >= batch * context + prefill
        row: Row = {
            "tp": place.tp,
            "dp": place.dp,
            "kv shard": layout.setup.kv_shard,
            "dispatch": layout.dispatch,
            "weights GiB": weights / 2**30,
            "cache tokens": cache_tokens,
            "fits": "yes" if fits else "no",
            "decode ms": 1e3 * decode_seconds if batch else None,
            "tok/s": batch / decode_seconds if batch else None,
            "prefill ms": 1e3 * prefill_seconds if prefill else None,
            "prefill tok/s": prefill / prefill_seconds if prefill else None,
        }
        seconds = (decode_seconds, prefill_seconds) if batch else (prefill_seconds, decode_seconds)
        candidates.append(_Candidate(fits, seconds, layout, row))
    if not candidates:
        raise ConfigError(f"{ranks} ranks: no tp x dp splits the heads and experts of this model")
    candidates.sort(key=lambda candidate: (not candidate.fits, candidate.seconds))
    best = candidates[0]
    report = Report("plan", rows=[candidate.row for candidate in candidates])
    title = "fastest that fits" if best.fits else "nothing fits; fastest"
    report.notes.append(f"{title}: {best.layout.flags()}")
    shapes = shapes_of(best.layout.setup.layout, batch, context, prefill)
    for name, shape in zip(("decode", "prefill"), shapes, strict=True):
        if shape.tokens:
            report.notes.append(f"its {name} step: {time_shares(best.layout.ops(shape), hw)}")
    report.notes.append("times: the floors of all operations and their launches; nothing overlaps")
    return report


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layout with its row of the report; `seconds` of its steps, the one to sort by first."""

    fits: bool
    seconds: tuple[float, float]
    layout: Layout
    row: Row


def shapes_of(
    place: ParallelConfig, batch: int, context: int, prefill: int
) -> tuple[StepShape, StepShape]:
    """Return the shapes of a dp group's decode step and prefill step."""
    decode = StepShape(decode=-(-batch // place.dp), context=context)
    return decode, StepShape(prefill=-(-prefill // place.dp))


def time_shares(ops: list[Op], hw: Hardware) -> str:
    """Return the four slowest operations of a step with their bounds, and the time of launches."""
    ops = sorted(ops, key=lambda op: -op.seconds(hw))
    shares = [f"{op.name} {1e3 * op.seconds(hw):.3g} ms ({op.bound(hw)})" for op in ops[:4]]
    launch_seconds = sum(op.count for op in ops) * hw.launch
    return ", ".join([*shares, f"launches {1e3 * launch_seconds:.3g} ms"])


def figure(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER") from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    text = "h200x8, h800x16, or a YAML file with the figures of a device (default: --measure)"
    add("--hardware", help=text)
    text = "replace figures of --hardware, such as link=2e11"
    add("--figure", type=figure, nargs="+", default=[], metavar="NAME=N", help=text)
    text = "decoding sequences, all dp groups together"
    add("--batch", type=at_least(0), default=128, help=text)
    text = "cached positions of each sequence"
    add("--context", type=at_least(0), default=4096, help=text)
    text = "tokens of a prefill step, all dp groups together"
    add("--prefill", type=at_least(0), default=8192, help=text)
    add("--measure", action="store_true", help="compare predicted with measured steps, here")
    add("--save-hardware", type=Path, help="file to write measured figures to")
    add("--threads", type=at_least(1), help="CPU threads of each rank (default: its share)")


def run(args: argparse.Namespace) -> Report | None:
    """Compare the layouts; only rank 0 returns the report."""
    if args.save_hardware:
        check_output(NamedFile("--save-hardware", args.save_hardware), HARDWARE_FILE)
    if args.measure:
        return measured_plan(args)
    if environment_world_size() > 1:
        raise ConfigError("only plan --measure runs on several ranks; start it without torchrun")
    return _computed_plan(args)
