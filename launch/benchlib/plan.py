"""Compare the layouts of a model: memory and step time, computed or measured on this machine.

    python launch/bench.py plan --config v3-671b --hardware h200x8 --batch 128 --context 4096
    python launch/bench.py plan --config v3-671b --hardware FILE.yaml --figure link=2e11
    torchrun --nproc-per-node 2 launch/bench.py plan --measure --save-hardware FILE.yaml

With --measure, step times of a model (without --ckpt-path: the demo model) are predicted from the
measured bandwidth of memory and links and the measured speed of matrix products, and compared with
measured times.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml

from benchlib.bound import weight_format
from benchlib.experts_hit import experts_hit
from benchlib.flags import at_least
from benchlib.hardware import HARDWARE_FILE, hardware, read_hardware
from benchlib.report import Report, Row, check_report, machine
from benchlib.roofline import Hardware, Op, RooflineSetup, step_ops
from benchlib.stand_in import stand_in_mesh
from benchlib.step_shape import StepShape
from common import tune_for_model, tune_process
from dsv3.cache.layout import CacheLayout
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ModelConfig, ParallelConfig, divisors
from dsv3.config_files import load_model_config
from dsv3.distributed.mesh import join_world
from dsv3.engine.engine import follow
from dsv3.engine.locate import locate_checkpoint, locate_description
from dsv3.engine.memory import plan_memory, weight_bytes
from dsv3.engine.program import (
    Parser,
    add_engine_flags,
    engine_config,
    set_up_logging,
)
from dsv3.engine.start import Started, start
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.files import NamedFile, check_output, write_output
from dsv3.parallel.weights import WeightFormat
from dsv3.setting_names import flag
from dsv3.settings import EngineConfig

_NO_LIMIT = 1_000_000  # sequences and tokens of a step
_REPEATS = 30
# Steps to measure: sequences, new tokens of each, positions before them. Every other one is used to
# fit the rates, the others to check the prediction.
CHECKED = (
    (1, 1, 64),
    (2, 1, 64),
    (8, 1, 64),
    (64, 1, 64),
    (32, 1, 256),
    (8, 1, 1000),
    (1, 64, 0),
    (1, 256, 0),
    (1, 1000, 0),
)
RATES = ("read", "fp8", "bf16", "fp32", "link", "net")
MEASURED = ("read", "fp32", "bf16", "link", "link_latency")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to split a model over ranks.

    Attributes:
        setup: the model on its ranks.
        dispatch: how tokens of several dp groups reach their experts: "alltoall" or "allreduce".
    """

    setup: RooflineSetup
    dispatch: str

    def ops(self, load: StepShape) -> list[Op]:
        """Return the operations of a step that has this load in every dp group.

        The operations are those of the rank with the most experts hit.
        """
        place = self.setup.layout
        hit = experts_hit(self.setup.config, place.ep, load.tokens * place.dp, busiest=True)
        ops = step_ops(self.setup, replace(load, hit=hit))
        return [self._as_dispatched(op, load.tokens) for op in ops]

    def seconds(self, load: StepShape, hw: Hardware) -> float:
        """Return the time of a step: the floors of all operations, and their launches."""
        if not load.tokens:
            return 0.0
        return sum(op.seconds(hw) + op.count * hw.launch for op in self.ops(load))

    def flags(self) -> str:
        """Return the flags of launch/generate.py that select the layout."""
        place = self.setup.layout
        dispatch = f" --moe-dispatch {self.dispatch}" if place.dp > 1 else ""
        return f"--tp {place.tp} --dp {place.dp} --kv-shard {self.setup.kv_shard}{dispatch}"

    def _as_dispatched(self, op: Op, tokens: int) -> Op:
        """Return an exchange with the bytes of an "allreduce" dispatch; other operations as is."""
        dp = self.setup.layout.dp
        if self.dispatch != "allreduce" or op.name not in ("moe.dispatch", "moe.combine"):
            return op
        is_packed = op.name == "moe.dispatch" and self.setup.weights == "fp8"
        size = 1 if is_packed else 4 if self.setup.plain == "fp32" else 2
        num_bytes = float(tokens * self.setup.config.hidden_size * size)
        return replace(op, bytes=(1 + dp) * num_bytes, wire=(dp - 1) * num_bytes)


def layouts(model: RooflineSetup, ranks: int) -> Iterator[Layout]:
    """Yield every layout of a model on a number of ranks."""
    config = model.config
    for tp in divisors(ranks):
        if config.num_attention_heads % tp or config.n_routed_experts % ranks:
            continue
        place = ParallelConfig(world_size=ranks, tp=tp, dp=ranks // tp)
        for kv_shard in ("tokens", "none") if tp > 1 else ("none",):
            for dispatch in ("alltoall", "allreduce") if place.dp > 1 else ("allreduce",):
                yield Layout(replace(model, layout=place, kv_shard=kv_shard), dispatch)


@cache
def weights_of(config: ModelConfig, layout: ParallelConfig, plain: str, is_fp8: bool) -> int:
    """Return the bytes of a rank's weights."""
    quantized = (s.name for s in tensor_specs(config).values() if s.quantizable)
    dtype = torch.float32 if plain == "fp32" else torch.bfloat16
    meta = torch.device("meta")
    fmt = WeightFormat(dtype, meta, frozenset(quantized if is_fp8 else ()))
    return weight_bytes(config, stand_in_mesh(layout, meta), fmt)


def memory(setup: RooflineSetup, hw: Hardware) -> tuple[int, int]:
    """Return the bytes of a rank's weights, and the positions that fit all caches beside them."""
    config, place = setup.config, setup.layout
    weights = weights_of(config, place, setup.plain, setup.weights == "fp8")
    cache = CacheLayout.make(config, setup.form, setup.kv_shard, setup.cache, place.tp, 0)
    settings = EngineConfig(max_running=_NO_LIMIT, max_batch_tokens=_NO_LIMIT)
    max_seq_len = config.max_position_embeddings
    device = torch.device("cuda")
    try:
        plan = plan_memory(config, settings, cache, weights, max_seq_len, int(hw.memory), device)
    except ConfigError:
        return weights, 0
    return weights, place.dp * plan.cache_tokens


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


def computed_plan(args: argparse.Namespace) -> Report:
    """Compare all layouts from hardware figures alone; no model is loaded."""
    if args.hardware == "measure":
        raise ConfigError("give --hardware (h200x8, h800x16, FILE), or --measure this machine")
    if args.save_hardware:
        raise ConfigError("--save-hardware writes the figures of --measure; give both or neither")
    config = load_model_config(args.config or locate_description(args.ckpt_path))
    ceilings, ranks = read_hardware(args.hardware, dict(args.figure))
    weights = "fp8" if config.quantization and args.dtype in ("auto", "fp8") else "bf16"
    weights = "fp32" if args.dtype == "float32" else weights
    cache = args.kv_dtype
    if cache == "auto":
        cache = "fp32" if weights == "fp32" else "bf16"
    model = RooflineSetup(config=config, layout=ParallelConfig(), weights=weights, cache=cache)
    report = rank_layouts(model, ranks, ceilings, args.batch, args.context, args.prefill)
    flags = ("hardware", "batch", "context", "prefill")
    report.setting = {name: getattr(args, name) for name in flags}
    report.setting |= {"weights": weights, "cache": cache}
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


def measured_plan(args: argparse.Namespace) -> Report | None:
    """Measure the machine and compare predicted with measured steps; rank 0 returns the report."""
    if args.hardware != "measure" or args.figure:
        raise ConfigError("--measure finds its own figures; leave --hardware and --figure out")
    with join_world(args.device, args.tp, args.dp, name=flag) as mesh:
        tune_process(mesh, args.threads)
        config = load_model_config(args.config) if args.config else None
        checkpoint = locate_checkpoint(args.ckpt_path, mesh)
        started = start(checkpoint, engine_config(args), mesh, config, args.n_experts)
        tune_for_model(started.config, mesh, args.threads)
        ceilings = hardware("measure", mesh.device, mesh.world, float(started.plan.free_bytes))
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
        report.setting |= machine(mesh.layout.world_size)
        return report


def fit(rows: np.ndarray) -> tuple[float, float]:
    """Fit slowdown * floor + launch * count = time with the least relative error.

    Args:
        rows: [3, steps]: floor in seconds, number of operations, measured seconds.

    Returns:
        slowdown, at least 1, and launch, the seconds beside each operation, above 0.
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
    cache = started.cache.layout
    setup = RooflineSetup(
        config=started.config,
        layout=started.mesh.layout,
        weights=weight_format(started.runner.model),
        cache=cache.dtype,
        form=cache.form,
        kv_shard="tokens" if cache.shards > 1 else "none",
    )
    layout = Layout(setup, dispatch)
    shapes: list[StepShape] = []
    measured: list[float] = []
    for batch, count, context in CHECKED:
        pages = -(-(context + count) // cache.page_size)
        if batch * pages > started.cache.num_usable_pages:
            raise ConfigError(
                "the cache is too small for these steps; give --kv-cache-size 16384tok"
            )
        page_table = np.arange(1, 1 + batch * pages, dtype=np.int32).reshape(batch, -1)
        token_ids = np.zeros(batch * count, np.int32)
        context_len = np.full(batch, context, np.int32)
        plans = [StepPlan.greedy(token_ids, context_len, page_table)] * setup.layout.dp

        def step(plans: list[StepPlan] = plans) -> None:
            started.channel.send(plans)
            started.runner.run(plans).to_host()

        is_decode = count == 1
        shapes.append(
            StepShape(
                decode=batch if is_decode else 0,
                context=context,
                prefill=0 if is_decode else batch * count,
            )
        )
        measured.append(least_seconds(step, started.mesh.device, started.mesh.world.size == 1))
    floors = [layout.seconds(shape, replace(hw, launch=0.0)) for shape in shapes]
    counts = [sum(op.count for op in layout.ops(shape)) for shape in shapes]
    slowdown, launch = fit(np.array([floors, counts, measured])[:, ::2])
    rates = {name: getattr(hw, name) / slowdown for name in RATES}
    hw = replace(hw, launch=launch, **rates)
    report = Report("plan --measure")
    for i, (batch, count, context) in enumerate(CHECKED):
        predicted = layout.seconds(shapes[i], hw)
        is_predicted = i % 2 == 1
        report.rows.append(
            {
                "step": f"{batch} x {count} after {context}",
                "floor ms": 1e3 * floors[i],
                "predicted ms": 1e3 * predicted if is_predicted else None,
                "measured ms": 1e3 * measured[i],
                "error %": 100 * (predicted / measured[i] - 1) if is_predicted else None,
            }
        )
    errors = [abs(row["error %"]) for row in report.rows[1::2]]
    report.notes = [
        f"the steps without an error were fitted: {1 / slowdown:.0%} of the measured rates, "
        f"{1e6 * hw.launch:.3g} us beside every operation",
        f"error of the others: {median(errors):.0f} % in the median, {max(errors):.0f} % at most",
    ]
    return report, hw


def figure(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER") from None


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="bench.py plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--figure",
        type=figure,
        nargs="+",
        default=[],
        metavar="NAME=N",
        help="replace figures of --hardware, such as link=2e11",
    )
    parser.add_argument(
        "--batch",
        type=at_least(0),
        default=128,
        help="decoding sequences, all dp groups together",
    )
    parser.add_argument(
        "--context",
        type=at_least(0),
        default=4096,
        help="cached positions of each sequence",
    )
    parser.add_argument(
        "--prefill",
        type=at_least(0),
        default=8192,
        help="tokens of a prefill step, all dp groups together",
    )
    parser.add_argument(
        "--measure", action="store_true", help="compare predicted with measured steps, here"
    )
    parser.add_argument("--save-hardware", type=Path, help="file to write measured figures to")
    parser.add_argument(
        "--threads", type=at_least(0), help="CPU threads of each rank (default: its share)"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    add_engine_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compare the layouts and print the report."""
    args = parse_args(arguments)
    check_report(args, inputs=("--hardware",), outputs=("--save-hardware",))
    if args.save_hardware:
        check_output(NamedFile("--save-hardware", args.save_hardware), HARDWARE_FILE)
    set_up_logging(args.debug)
    report = measured_plan(args) if args.measure else computed_plan(args)
    if report is not None:
        report.publish(args.json)
    return 0
