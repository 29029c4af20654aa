"""Which layout to run a model in: memory and the time of a step, on paper or on this machine.

    python launch/bench.py plan --config v3-671b --hardware h200x8 --batch 128 --context 4096
    python launch/bench.py plan --config v3-671b --hardware FILE.yaml --figure link=2e11
    torchrun --nproc-per-node 2 launch/bench.py plan --measure --save-hardware FILE.yaml

With --measure: steps of a model (the demo's, without --ckpt-path) are foretold from what memory,
products and links were measured to do, and held to the clock.
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
from benchlib.roofline import Hardware, Op, Setup, step_ops
from benchlib.stand_in import stand_in_mesh
from benchlib.step_shape import StepShape
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

_MANY, _REPEATS = 1_000_000, 30
# Steps held to the clock: sequences, new tokens of each, positions before them.
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
    """One way to run a model.

    Attributes:
        setup: the model on its ranks.
        dispatch: how tokens of several dp groups come to their experts.
    """

    setup: Setup
    dispatch: str

    def ops(self, load: StepShape) -> list[Op]:
        """Return the operations of a step that has this load in every dp group.

        They are those of the rank on which most experts are hit.
        """
        place = self.setup.layout
        hit = experts_hit(self.setup.config, place.ep, load.tokens * place.dp, busiest=True)
        ops = step_ops(self.setup, replace(load, hit=hit))
        return [self._gathered(op, load.tokens) for op in ops]

    def seconds(self, load: StepShape, hw: Hardware) -> float:
        """Return the time of a step: the floors of all operations, and their launches."""
        if not load.tokens:
            return 0.0
        return sum(op.seconds(hw) + op.count * hw.launch for op in self.ops(load))

    def flags(self) -> str:
        """Return the flags that ask for it."""
        place = self.setup.layout
        dispatch = f" --moe-dispatch {self.dispatch}" if place.dp > 1 else ""
        return f"--tp {place.tp} --dp {place.dp} --kv-shard {self.setup.kv_shard}{dispatch}"

    def _gathered(self, op: Op, tokens: int) -> Op:
        """Return what stands for a way to the experts where every group sees all tokens."""
        dp = self.setup.layout.dp
        if self.dispatch != "allreduce" or op.name not in ("moe.dispatch", "moe.combine"):
            return op
        is_packed = op.name == "moe.dispatch" and self.setup.weights == "fp8"
        size = 1 if is_packed else 4 if self.setup.plain == "fp32" else 2
        num_bytes = float(tokens * self.setup.config.hidden_size * size)
        return replace(op, bytes=(1 + dp) * num_bytes, wire=(dp - 1) * num_bytes)


def layouts(model: Setup, ranks: int) -> Iterator[Layout]:
    """Yield every way to run a model on so many ranks."""
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


def memory(setup: Setup, hw: Hardware) -> tuple[int, int]:
    """Return the bytes of a rank's weights, and the positions that all caches hold beside them."""
    config, place = setup.config, setup.layout
    weights = weights_of(config, place, setup.plain, setup.weights == "fp8")
    cache = CacheLayout.make(config, setup.form, setup.kv_shard, setup.cache, place.tp, 0)
    settings = EngineConfig(max_running=_MANY, max_batch_tokens=_MANY)
    longest, device = config.max_position_embeddings, torch.device("cuda")
    try:
        plan = plan_memory(config, settings, cache, weights, longest, int(hw.memory), device)
    except ConfigError:
        return weights, 0
    return weights, place.dp * plan.cache_tokens


def least_seconds(run: Callable[[], object], device: torch.device, alone: bool) -> float:
    """Return the least time of a call that has run before: others' work only adds to it.

    What a CPU does `alone`, without waiting for other ranks, is timed by the processor's time: on
    a busy machine no long call has the processor for itself.
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


def on_paper(args: argparse.Namespace) -> Report:
    """On paper: no ranks."""
    if args.hardware == "measure":
        raise ConfigError("give --hardware (h200x8, h800x16, FILE), or --measure this machine")
    if args.save_hardware:
        raise ConfigError("--save-hardware writes what --measure finds; add that, or leave it out")
    config = load_model_config(args.config or locate_description(args.ckpt_path))
    ceilings, ranks = read_hardware(args.hardware, dict(args.figure))
    weights = "fp8" if config.quantization and args.dtype in ("auto", "fp8") else "bf16"
    weights = "fp32" if args.dtype == "float32" else weights
    cache = args.kv_dtype
    if cache == "auto":
        cache = "fp32" if weights == "fp32" else "bf16"
    model = Setup(config=config, layout=ParallelConfig(), weights=weights, cache=cache)
    report = rank_layouts(model, ranks, ceilings, args.batch, args.context, args.prefill)
    what = ("hardware", "batch", "context", "prefill")
    report.setting = {name: getattr(args, name) for name in what}
    report.setting |= {"weights": weights, "cache": cache}
    return report


def rank_layouts(
    model: Setup, ranks: int, hw: Hardware, batch: int, context: int, prefill: int
) -> Report:
    """Compare all layouts, the fastest that fits first.

    Args:
        model: in any layout.
        ranks: how many there are.
        hw: one rank's device and links.
        batch: sequences that decode, all dp groups together.
        context: positions that each of them has cached.
        prefill: prompt tokens of a prefill step, all dp groups together.

    Raises:
        ConfigError: no layout splits the model.
    """
    found: list[tuple[bool, list[float], Layout, Row]] = []
    for layout in layouts(model, ranks):
        place = layout.setup.layout
        weights, room = memory(layout.setup, hw)
        times = [layout.seconds(x, hw) for x in shapes_of(place, batch, context, prefill)]
        fits = room >= batch * context + prefill
        row: Row = {
            "tp": place.tp,
            "dp": place.dp,
            "kv shard": layout.setup.kv_shard,
            "dispatch": layout.dispatch,
            "weights GiB": weights / 2**30,
            "cache tokens": room,
            "fits": "yes" if fits else "no",
            "decode ms": 1e3 * times[0] if batch else None,
            "tok/s": batch / times[0] if batch else None,
            "prefill ms": 1e3 * times[1] if prefill else None,
            "prefill tok/s": prefill / times[1] if prefill else None,
        }
        found.append((not fits, times if batch else times[::-1], layout, row))
    if not found:
        raise ConfigError(f"{ranks} ranks: no tp x dp splits the heads and experts of this model")
    found.sort(key=lambda one: one[:2])
    unfit, _, best, _ = found[0]
    loads = shapes_of(best.setup.layout, batch, context, prefill)
    report = Report("plan", rows=[row for *_, row in found])
    report.notes = [
        f"{'nothing fits; fastest' if unfit else 'fastest that fits'}: {best.flags()}",
        *(
            f"its {n} step: {shares(best.ops(x), hw)}"
            for n, x in zip(("decode", "prefill"), loads, strict=True)
            if x.tokens
        ),
        "times: the floors of all operations and their launches; nothing overlaps",
    ]
    return report


def shapes_of(
    place: ParallelConfig, batch: int, context: int, prefill: int
) -> tuple[StepShape, StepShape]:
    """Return what a dp group has to do in a decode step, and in a prefill step."""
    decode = StepShape(decode=-(-batch // place.dp), context=context)
    return decode, StepShape(prefill=-(-prefill // place.dp))


def shares(ops: list[Op], hw: Hardware) -> str:
    """Tell what takes most of a step, and what that waits for."""
    ops = sorted(ops, key=lambda op: -op.seconds(hw))
    most = [f"{op.name} {1e3 * op.seconds(hw):.3g} ms ({op.bound(hw)})" for op in ops[:4]]
    return ", ".join([*most, f"launches {1e3 * sum(op.count for op in ops) * hw.launch:.3g} ms"])


def on_this_machine(args: argparse.Namespace) -> Report | None:
    """Measure the machine, then foretell steps of the model; the report is rank 0's."""
    if args.hardware != "measure" or args.figure:
        raise ConfigError("--measure finds its own figures; leave --hardware and --figure out")
    with join_world(args.device, args.tp, args.dp, name=flag) as mesh:
        if args.threads:
            torch.set_num_threads(args.threads)
        config = load_model_config(args.config) if args.config else None
        checkpoint = locate_checkpoint(args.ckpt_path, mesh)
        started = start(checkpoint, engine_config(args), mesh, config, args.n_experts)
        found = hardware("measure", mesh.device, mesh.world, float(started.plan.free_bytes))
        ceilings = replace(found, ranks_per_host=mesh.ranks_on_host)
        if started.engine is None:
            follow(started.runner, started.channel)
            return None
        try:
            dispatch = "allreduce" if args.moe_dispatch == "allreduce" else "alltoall"
            report, found = check_steps(started, ceilings, dispatch)
        finally:
            started.engine.stop()
        if args.save_hardware:
            figures = asdict(found) | {"ranks": mesh.layout.world_size}
            file = NamedFile("--save-hardware", args.save_hardware)
            write_output(file, HARDWARE_FILE, yaml.safe_dump(figures, sort_keys=False))
        report.setting = {name: f"{getattr(ceilings, name):.3g}" for name in MEASURED}
        report.setting |= machine(mesh.layout.world_size)
        return report


def fit(rows: np.ndarray) -> tuple[float, float]:
    """Return (slower, launch) of least relative error in slower * floor + launch * count = time.

    Nothing is faster than its floor, and no launch takes negative time.
    """
    (floor, count), clocked = rows[:2] / rows[2], np.ones(rows.shape[1])
    slower, launch = np.linalg.lstsq(np.stack([floor, count], 1), clocked, rcond=None)[0].tolist()
    if launch <= 0:
        slower = float(floor @ clocked / (floor @ floor))
    if slower < 1:
        launch = float(count @ (clocked - floor) / (count @ count))
    return max(slower, 1.0), max(launch, 1e-9)


def check_steps(started: Started, hw: Hardware, dispatch: str) -> tuple[Report, Hardware]:
    """Hold foretold times of steps to the clock, on rank 0; the other ranks follow.

    Every dp group does the same.

    A step takes its floor over a share, and a time for each operation beside it. Every other step
    tells the two; what those between take is foretold.

    Returns:
        The report, and the hardware as these steps found it.
    """
    cache = started.cache.layout
    setup = Setup(
        config=started.config,
        layout=started.mesh.layout,
        weights=weight_format(started.runner.model),
        cache=cache.dtype,
        form=cache.form,
        kv_shard="tokens" if cache.shards > 1 else "none",
    )
    layout, loads, clocked = Layout(setup, dispatch), [], []
    for batch, count, context in CHECKED:
        pages = -(-(context + count) // cache.page_size)
        if batch * pages > started.cache.num_usable_pages:
            raise ConfigError(
                "the cache is too small for these steps; give --kv-cache-size 16384tok"
            )

        table = np.arange(1, 1 + batch * pages, dtype=np.int32).reshape(batch, -1)
        tokens, behind = np.zeros(batch * count, np.int32), np.full(batch, context, np.int32)
        plans = [StepPlan.greedy(tokens, behind, table)] * setup.layout.dp

        def step(plans: list[StepPlan] = plans) -> None:
            started.channel.send(plans)
            started.runner.run(plans).to_host()

        decode, prompt = (batch, 0) if count == 1 else (0, batch * count)
        loads.append(StepShape(decode=decode, context=context, prefill=prompt))
        clocked.append(least_seconds(step, started.mesh.device, started.mesh.world.size == 1))
    floors = [layout.seconds(load, replace(hw, launch=0.0)) for load in loads]
    counts = [sum(op.count for op in layout.ops(load)) for load in loads]
    slower, launch = fit(np.array([floors, counts, clocked])[:, ::2])
    rates = {name: getattr(hw, name) / slower for name in RATES}
    hw = replace(hw, launch=launch, **rates)
    report = Report("plan --measure")
    for i, (batch, count, context) in enumerate(CHECKED):
        foretold = layout.seconds(loads[i], hw)
        is_foretold = i % 2 == 1
        report.rows.append(
            {
                "step": f"{batch} x {count} after {context}",
                "floor ms": 1e3 * floors[i],
                "foretold ms": 1e3 * foretold if is_foretold else None,
                "measured ms": 1e3 * clocked[i],
                "error %": 100 * (foretold / clocked[i] - 1) if is_foretold else None,
            }
        )
    errors = [abs(row["error %"]) for row in report.rows[1::2]]
    report.notes = [
        f"the steps without an error were fitted: {1 / slower:.0%} of the measured rates, "
        f"{1e6 * hw.launch:.3g} us beside every operation",
        f"error of the others: {median(errors):.0f} % in the median, {max(errors):.0f} % at most",
    ]
    return report, hw


def figure(text: str) -> tuple[str, float]:
    """Read NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER") from None


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="bench.py plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--figure", type=figure, nargs="+", default=[], metavar="NAME=N", help="other figures"
    )
    parser.add_argument("--batch", type=at_least(0), default=128, help="sequences, all groups")
    parser.add_argument("--context", type=at_least(0), default=4096, help="positions of each")
    parser.add_argument("--prefill", type=at_least(0), default=8192, help="tokens of a prompt step")
    parser.add_argument("--measure", action="store_true", help="this machine, held to the clock")
    parser.add_argument("--save-hardware", type=Path, help="write the measured figures here")
    parser.add_argument("--threads", type=at_least(0), help="of each rank (default: its share)")
    parser.add_argument("--json", type=Path, help="write the result here")
    add_engine_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compare, report."""
    args = parse_args(arguments)
    check_report(args, inputs=("--hardware",), outputs=("--save-hardware",))
    if args.save_hardware:
        check_output(NamedFile("--save-hardware", args.save_hardware), HARDWARE_FILE)
    set_up_logging(args.debug)
    report = on_this_machine(args) if args.measure else on_paper(args)
    if report is not None:
        report.publish(args.json)
    return 0
