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
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchlib.bound import bottleneck_report
from benchlib.flags import add_program_flags, at_least
from benchlib.hardware import hardware
from benchlib.kernel_timing import busy_and_idle, kernel_intervals
from benchlib.profiler import Clock, Profiler, profile
from benchlib.report import Report, Row, check_report, machine
from benchlib.roofline import Hardware, RooflineSetup, floor_seconds, step_ops
from benchlib.stand_in import stand_in_mesh
from common import tune_process
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.mesh import join_world
from dsv3.engine.program import Parser, set_up_logging
from dsv3.engine.runner import Runner
from dsv3.engine.start import set_launches
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.model.attention import absorb_limit
from dsv3.model.moe import MoE
from dsv3.model.transformer import Transformer
from dsv3.parallel.weights import FP8, WeightFormat
from dsv3.setting_names import flag
from dsv3.settings import CacheDtype, KvShard

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# Keeps the device busy while the host launches a step, so that events show the device's time.
_HOLD_CYCLES = 200_000_000
_WARM_UP = 3  # steps that compile and capture


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """The share of a model that one rank holds, and its storage formats.

    Attributes:
        world: number of ranks.
        layers: number of first layers to keep, at most one of them dense; 0 keeps all.
        weights, cache: "fp8", "bf16" or "fp32".
        moves: exchanges write their bytes to memory; otherwise they cost next to nothing.
        skew: Zipf exponent of the experts' popularity; 0 is uniform.
    """

    config: ModelConfig
    world: int
    rank: int = 0
    layers: int = 0
    weights: str = "fp8"
    cache: CacheDtype = "bf16"
    kv_shard: KvShard = "tokens"
    moves: bool = True
    skew: float = 0.0
    seed: int = 0

    @property
    def cut(self) -> ModelConfig:
        """Config of the model with the kept layers."""
        c = self.config
        if not self.layers or self.layers >= c.num_hidden_layers:
            return c
        dense = min(1, c.first_k_dense_replace)
        return replace(c, num_hidden_layers=self.layers, first_k_dense_replace=dense)


class Rank:
    """A rank's share of a model, ready to run.

    Args:
        shape: the share.
        device: device to allocate it on.
        positions: number of positions of all sequences that fit the cache.
    """

    def __init__(self, shape: RankShape, device: torch.device, positions: int) -> None:
        self.shape = shape
        self.config = shape.cut
        self.device = device
        layout = ParallelConfig(world_size=shape.world, rank=shape.rank)
        layout.check(self.config)
        if shape.weights == "fp8" and self.config.quantization is None:
            raise ConfigError("--weights=fp8 but the model is not stored in FP8; use bf16")
        torch.manual_seed(shape.seed)
        self._mesh = stand_in_mesh(layout, device, shape.moves)
        self.model = self._make_model()
        cached = CacheLayout.make(
            self.config, "latent", shape.kv_shard, shape.cache, layout.tp, layout.tp_rank
        )
        pages = positions // cached.page_size
        self.cache = CachePool(
            cached, self.config.num_hidden_layers, pages + 1, device, self._mesh.tp
        )
        for layer in range(self.config.num_hidden_layers):  # a cache of zeros would cost less power
            page = torch.randn(cached.slots_per_page, cached.width, device=device)
            layer_cache = self.cache.layer(layer)
            layer_cache.write(torch.arange(cached.slots_per_page, device=device), page)
            slots_by_page = layer_cache.slots.view(pages + 1, -1)
            slots_by_page[1:] = slots_by_page[0]
        self._rng = np.random.default_rng(shape.seed)

    @property
    def setup(self) -> RooflineSetup:
        """The setup for roofline floors."""
        return RooflineSetup(
            config=self.config,
            layout=self._mesh.layout,
            weights=self.shape.weights,
            cache=self.shape.cache,
            kv_shard=self.shape.kv_shard,
        )

    def new_runner(self, eager: bool = False) -> Runner:
        """Return a new runner of the share."""
        static = self.device.type == "cuda" and not eager
        return Runner(self.model, self.cache, absorb_limit(self.config), static=static)

    def _make_model(self) -> Transformer:
        specs = tensor_specs(self.config)
        weight_format = WeightFormat(_DTYPES[self.shape.weights], self.device)
        if self.shape.weights == "fp8" and self.config.quantization is not None:
            weight_format = replace(
                weight_format,
                fp8_names=frozenset(name for name, spec in specs.items() if spec.quantizable),
                fp8_products=True,
                ue8m0=self.config.quantization.scale_fmt == "ue8m0",
            )
        model = Transformer(self.config, self._mesh, weight_format)
        for target in model.targets():
            _fill(target.dest, target.name)
            if target.scale is not None:
                target.scale.fill_(target.dest.shape[1] ** -0.5)
        self._make_popular(model)
        return model.eval()

    def _make_popular(self, model: Transformer) -> None:
        """Bias the routers so that the experts' popularity follows `shape.skew`."""
        for module in model.modules():
            if isinstance(module, MoE) and module.router.bias is not None:
                bias = module.router.bias.weight
                popularity_rank = torch.randperm(len(bias), device=bias.device) + 1.0
                bias.copy_(-0.1 * self.shape.skew * popularity_rank.log())

    def plan(self, batch: int, context: int, new: int) -> StepPlan:
        """Return a step in which sequences of `context` positions get `new` random tokens each.

        Tokens are from this rank's part of the vocabulary; others would be embedded as zeros.
        """
        pages = self.cache.layout.pages_for(context + new)
        pages_BG = np.arange(1, 1 + batch * pages, dtype=np.int32).reshape(batch, pages)
        embed = self.model.embed_tokens
        tokens = embed.start + self._rng.integers(0, embed.rows, batch * new)
        return StepPlan.greedy(tokens.astype(np.int32), np.full(batch, context, np.int32), pages_BG)

    def count_hits(self, plan: StepPlan) -> tuple[float, float]:
        """Run a step; return local experts hit and rows routed to them, mean of the MoE layers."""
        num_local = self.config.n_routed_experts // self.shape.world
        hits: list[tuple[int, int]] = []
        hooks = []

        def count(first: int, _module: object, _x: object, out: tuple[Tensor, Tensor]) -> None:
            ids = out[0][(out[0] >= first) & (out[0] < first + num_local)]
            hits.append((len(ids.unique()), len(ids)))

        for moe in self.model.modules():
            if isinstance(moe, MoE):
                hooks.append(moe.router.register_forward_hook(partial(count, moe.local.first)))
        Runner(self.model, self.cache, absorb_limit(self.config)).run([plan])
        for hook in hooks:
            hook.remove()
        experts, entries = np.mean(hits or [(0, 0)], axis=0)
        return float(experts), float(entries)


def _fill(weight: Tensor, name: str) -> None:
    """Fill a weight with random values about as large as a trained model's.

    The embedding dominates the hidden states, so they differ between tokens in all layers, and so
    do the experts that tokens are routed to.
    """
    if weight.dtype == FP8:
        weight.view(torch.uint8).random_(0, 256).bitwise_and_(0xBF)  # no exponent above 2, no NaN
    elif weight.dim() == 1:
        weight.fill_(1.0)
    elif "embed_tokens" in name:
        weight.normal_()
    elif weight.numel():
        weight.normal_(std=weight.shape[-1] ** -0.5)


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
            hardware(args.hardware, mesh.device),
            batches=args.batch,
            context=args.context,
            prefill=args.prefill,
            steps=args.steps,
            eager=args.enforce_eager,
        )
        report.setting |= machine(1) | {"overlapping launches": args.overlap_launches}
    report.publish(args.json)
    return 0
