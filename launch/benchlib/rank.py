"""Measure one rank's exact share of a large model on one device, with random weights.

    python launch/bench.py rank --config v3-671b --world 8 --layers 4 --batch 1 8 128 --context 1024
    python launch/bench.py rank --config v3-671b --world 8 --layers all --prefill 4096 --no-comm

The heads, experts and cache shard of rank r of w are allocated on the device and run by the runner
that serves requests; collectives are local stand-ins. So the time of a step is that of the rank
without its links.
"""

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchlib.bound import bottleneck_report
from benchlib.flags import add_program_flags, at_least
from benchlib.hardware import hardware
from benchlib.kernel_timing import busy_and_idle, kernel_intervals
from benchlib.profiler import Clock, Profiler, profile
from benchlib.rank_share import Rank, RankShape
from benchlib.report import Report, Row, check_report, machine
from benchlib.roofline import Hardware, floor_seconds, step_ops
from common import tune_process
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.mesh import join_world
from dsv3.engine.program import Parser, set_up_logging
from dsv3.engine.start import set_launches
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.setting_names import flag
from dsv3.settings import CacheDtype

# Keeps the device busy while the host launches a step, so that events show the device's time.
_HOLD_CYCLES = 200_000_000
_WARM_UP = 3  # steps that compile and capture


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


def profile_steps(rank: Rank, plans: Callable[[], StepPlan], steps: int) -> Profiler:
    """Measure each operation of eager steps; a GPU is kept busy while the host launches a step."""
    runner = rank.new_runner(eager=True)
    profiler = profile(runner)
    for i in range(1 + min(steps, 5)):
        if i == 1:  # the first step compiles and warms up
            profiler.clear()
        if rank.device.type == "cuda":
            torch.cuda._sleep(_HOLD_CYCLES)
        runner.run([plans()])
    profiler.detach()
    return profiler


def measure_step(
    rank: Rank,
    name: str,
    plans: Callable[[], StepPlan],
    ceilings: Hardware,
    steps: int,
    eager: bool,
) -> tuple[list[Row], list[str]]:
    """Measure one kind of step: as it is served, and operation by operation.

    Args:
        rank: the share.
        name: name of the step.
        plans: returns the next step's plan.
        ceilings: peak rates of the device; exchanges only count the bytes that stand-ins move.
        steps: number of timed steps.
        eager: run without CUDA graphs.

    Returns:
        rows of the operations, and notes about the step.
    """
    hits = rank.count_hits(plans())
    served = rank.new_runner(eager)
    on_gpu = rank.device.type == "cuda"
    profiler = profile_steps(rank, plans, steps)
    # Several in a row, as in serving: the host launches one while the device runs another.
    ready = [[plans()] for _ in range(4 if on_gpu else 1)]
    seconds, launch = time_steps(served.run, ready, rank.device, steps)
    shape = replace(next(iter(profiler.shapes)), hit=hits)
    profiler.shapes = Counter({shape: profiler.steps})
    local = replace(ceilings, link=math.inf, net=math.inf, link_latency=0.0, net_latency=0.0)
    rows = bottleneck_report(profiler, rank.setup, local).rows
    floor = floor_seconds(step_ops(rank.setup, shape), local)
    note = (
        f"{name}: {1e3 * seconds:.4g} ms a step, floor {1e3 * floor:.4g} ms "
        f"({100 * floor / seconds:.3g} % of the roof), launched in {1e6 * launch:,.0f} us; its "
        f"operations one by one {1e3 * profiler.step_seconds / profiler.steps:.4g} ms; "
        f"{hits[0]:.1f} local experts hit by {hits[1]:.1f} entries"
    )
    if on_gpu:
        kernels = kernel_intervals(lambda: served.run([plans()]))
        busy, idle = busy_and_idle(kernels)
        note += f"; {len(kernels)} kernels busy {1e3 * busy:.4g} ms, gaps {1e3 * idle:.4g} ms"
    notes = [note]
    factor = all_layers_factor(rank, rows)
    if factor != 1:
        layers = rank.shape.config.num_hidden_layers
        all_ms = 1e3 * seconds * factor
        notes.append(f"{name}, all {layers} layers at the same rates: {all_ms:.4g} ms")
    return [{"step": name, **row} for row in rows], notes


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


def rank_report(
    shape: RankShape,
    device: torch.device,
    ceilings: Hardware,
    batches: list[int],
    context: int,
    prefill: int,
    steps: int,
    eager: bool = False,
) -> Report:
    """Measure decode steps of several batch sizes, and one prefill step."""
    page = 2 * max(64, shape.world)
    rank = Rank(shape, device, max([b * (context + page) for b in batches] + [prefill + page]))
    model_gib = rank.model.num_bytes / 2**30
    cache_gib = rank.cache.num_bytes / 2**30
    report = Report("rank", setting={"rank": f"{shape.rank} of {shape.world}"})
    report.setting |= {
        "layers": rank.config.num_hidden_layers,
        "weights": f"{shape.weights} {model_gib:.4g} GiB",
        "cache": f"{shape.cache} {cache_gib:.4g} GiB, {shape.kv_shard}",
        "exchanges": "moved locally" if shape.moves else "left out",
        "skew": shape.skew,
        "ceilings": ceilings.name,
    }
    kinds = [(f"decode {b} at {context}", (b, context, 1)) for b in batches]
    kinds += [(f"prefill {prefill}", (1, 0, prefill))] if prefill else []
    for name, (batch, cached, new) in kinds:
        make_plan = partial(rank.plan, batch, cached, new)
        rows, notes = measure_step(rank, name, make_plan, ceilings, steps, eager)
        report.rows += rows
        report.notes += notes
    return report


def shape_of(args: argparse.Namespace, on_cpu: bool) -> RankShape:
    """Return the share that the flags select."""
    config = load_model_config(args.config)
    if not 0 <= args.rank < args.world:
        raise ConfigError(f"--rank={args.rank} is not in 0..{args.world - 1}")
    if args.layers != "all" and not args.layers.isdecimal():
        raise ConfigError(f"--layers={args.layers} is neither a number nor all")
    plain: CacheDtype = "fp32" if on_cpu else "bf16"
    weights = plain if config.quantization is None else "fp8"
    return RankShape(
        config=config,
        world=args.world,
        rank=args.rank,
        layers=0 if args.layers == "all" else int(args.layers),
        weights=weights if args.weights == "auto" else args.weights,
        cache=plain if args.kv_dtype == "auto" else args.kv_dtype,
        kv_shard=args.kv_shard,
        moves=not args.no_comm,
        skew=args.skew,
        seed=args.seed,
    )


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="bench.py rank", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="v3-671b", help="a preset's name or a config file")
    parser.add_argument("--world", type=at_least(1), default=8, help="number of ranks")
    parser.add_argument("--rank", type=int, default=0, help="rank to measure (default: 0)")
    parser.add_argument("--layers", default="4", help="N: one dense and N - 1 MoE layers; or all")
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        default=[1, 8, 128],
        help="sequences of a decode step",
    )
    parser.add_argument(
        "--context",
        type=at_least(1),
        default=1024,
        help="cached tokens of each sequence",
    )
    parser.add_argument(
        "--prefill", type=int, default=0, help="also measure a prompt of N tokens (default: none)"
    )
    parser.add_argument(
        "--weights",
        default="auto",
        choices=["auto", "fp8", "bf16", "fp32"],
        help="format of the weights; auto is the stored format",
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        choices=["auto", "fp8", "bf16", "fp32"],
        help="format of the cache; auto is bf16, on a CPU fp32",
    )
    parser.add_argument(
        "--kv-shard",
        default="none",
        choices=["none", "tokens"],
        help="split the cache's positions over tp, or replicate them",
    )
    parser.add_argument(
        "--skew", type=float, default=0.0, help="Zipf exponent of the experts (default: 0, uniform)"
    )
    parser.add_argument("--no-comm", action="store_true", help="skip exchanges")
    parser.add_argument("--steps", type=at_least(1), default=20, help="timed steps of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--hardware",
        default="measure",
        help="ceilings: measure (on this device), or the name of a device, such as h100",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="run without CUDA graphs")
    parser.add_argument(
        "--overlap-launches",
        action="store_true",
        help="launch each kernel before the previous one ends",
    )
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: all)")
    add_program_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Allocate the share, measure its steps and print the report."""
    args = parse_args(arguments)
    check_report(args)
    set_up_logging(args.debug)
    with join_world(args.device, name=flag) as mesh:
        tune_process(mesh, args.threads)
        set_launches(args.overlap_launches, mesh.device, "--overlap-launches")
        shape = shape_of(args, mesh.device.type == "cpu")
        report = rank_report(
            shape,
            mesh.device,
            hardware(args.hardware, mesh.device, fp32=shape.weights == "fp32"),
            batches=args.batch,
            context=args.context,
            prefill=args.prefill,
            steps=args.steps,
            eager=args.enforce_eager,
        )
        report.setting |= machine(1) | {"overlapping launches": args.overlap_launches}
    report.publish(args.json)
    return 0
