"""One rank's exact share of a large model on one device: random weights of the true shapes.

    python launch/bench.py rank --config v3-671b --world 8 --layers 4 --batch 1 8 128 --context 1024
    python launch/bench.py rank --config v3-671b --world 8 --layers all --prefill 4096 --no-comm

What rank r of w holds (heads, experts, cache shard) is made on the device and run through the same
runner that serves; exchanges are local stand-ins. So a step's time is the rank's own, links aside.
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

from benchlib.bound import what_bounds
from benchlib.flags import add_program_flags, at_least
from benchlib.hardware import hardware
from benchlib.kernel_timing import busy_and_idle, kernel_intervals
from benchlib.profiler import Clock, Profiler, profile
from benchlib.report import Report, Row, check_report, machine
from benchlib.roofline import Hardware, Setup, floor_seconds, step_ops
from benchlib.stand_in import stand_in_mesh
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
    """Which share of which model, and how it is held.

    Attributes:
        layers: the first ones, at most one of them dense; 0 for all.
        weights, cache: "fp8", "bf16" or "fp32".
        moves: exchanges write their bytes to memory; otherwise they cost next to nothing.
        skew: exponent of the experts' popularity (Zipf); 0 for uniform.
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
        """The model with the layers that are left of it."""
        c = self.config
        if not self.layers or self.layers >= c.num_hidden_layers:
            return c
        dense = min(1, c.first_k_dense_replace)
        return replace(c, num_hidden_layers=self.layers, first_k_dense_replace=dense)


class Rank:
    """The share, ready to run.

    Args:
        shape: which one.
        device: where.
        positions: of all sequences together that the cache must hold.
    """

    def __init__(self, shape: RankShape, device: torch.device, positions: int) -> None:
        self.shape, self.config, self.device = shape, shape.cut, device
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
            part = self.cache.layer(layer)
            part.write(torch.arange(cached.slots_per_page, device=device), page)
            every = part.slots.view(pages + 1, -1)
            every[1:] = every[0]
        self._rng = np.random.default_rng(shape.seed)

    @property
    def setup(self) -> Setup:
        """What the roofline must know."""
        formats = {name: getattr(self.shape, name) for name in ("weights", "cache", "kv_shard")}
        return Setup(config=self.config, layout=self._mesh.layout, **formats)

    def new_runner(self, eager: bool = False) -> Runner:
        """Return a runner on the share."""
        static = self.device.type == "cuda" and not eager
        return Runner(self.model, self.cache, absorb_limit(self.config), static=static)

    def _make_model(self) -> Transformer:
        specs = tensor_specs(self.config)
        fmt = WeightFormat(_DTYPES[self.shape.weights], self.device)
        if self.shape.weights == "fp8" and self.config.quantization is not None:
            kept = frozenset(name for name, spec in specs.items() if spec.quantizable)
            ue8m0 = self.config.quantization.scale_fmt == "ue8m0"
            fmt = replace(fmt, fp8_names=kept, fp8_products=True, ue8m0=ue8m0)
        model = Transformer(self.config, self._mesh, fmt)
        for target in model.targets():
            _fill(target.dest, target.name)
            if target.scale is not None:
                target.scale.fill_(target.dest.shape[1] ** -0.5)
        self._make_popular(model)
        return model.eval()

    def _make_popular(self, model: Transformer) -> None:
        """Bias the routers, so that some experts are chosen more often than others."""
        for module in model.modules():
            if isinstance(module, MoE) and module.router.bias is not None:
                bias = module.router.bias.weight
                rank = torch.randperm(len(bias), device=bias.device) + 1.0
                bias.copy_(-0.1 * self.shape.skew * rank.log())

    def plan(self, batch: int, context: int, new: int) -> StepPlan:
        """Return a step in which sequences of `context` positions get `new` random tokens each.

        Tokens are of this rank's part of the vocabulary: the others' would be embedded as zeros.
        """
        pages = self.cache.layout.pages_for(context + new)
        pages_BG = np.arange(1, 1 + batch * pages, dtype=np.int32).reshape(batch, pages)
        embed = self.model.embed_tokens
        tokens = embed.start + self._rng.integers(0, embed.rows, batch * new)
        return StepPlan.greedy(tokens.astype(np.int32), np.full(batch, context, np.int32), pages_BG)

    def count_hits(self, plan: StepPlan) -> tuple[float, float]:
        """Run a step; return local experts hit and entries that hit them, mean of MoE layers."""
        held, hits, hooks = self.config.n_routed_experts // self.shape.world, [], []

        def look(first: int, _module: object, _x: object, out: tuple[Tensor, Tensor]) -> None:
            ids = out[0][(out[0] >= first) & (out[0] < first + held)]
            hits.append((len(ids.unique()), len(ids)))

        for moe in self.model.modules():
            if isinstance(moe, MoE):
                hooks.append(moe.router.register_forward_hook(partial(look, moe.local.first)))
        Runner(self.model, self.cache, absorb_limit(self.config)).run([plan])
        for hook in hooks:
            hook.remove()
        experts, entries = np.mean(hits or [(0, 0)], axis=0)
        return float(experts), float(entries)


def _fill(weight: Tensor, name: str) -> None:
    """Write random values of a trained model's size; the embedding stays the largest part.

    Hidden states of different tokens then stay different through all layers, and so do the experts
    they choose.
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
    """Return medians of a step's seconds, one after the other, and of those to launch one."""
    clock, whole, host = Clock(device), [], []
    for _ in range(_WARM_UP + rounds):
        launch, begin = time.perf_counter(), clock.mark()
        run(plans[0])
        host.append(time.perf_counter() - launch)
        for plan in plans[1:]:
            run(plan)
        end = clock.mark()
        clock.settle()
        whole.append(clock.seconds(begin, end) / len(plans))
    return statistics.median(whole[_WARM_UP:]), statistics.median(host[_WARM_UP:])


def profile_steps(rank: Rank, plans: Callable[[], StepPlan], steps: int) -> Profiler:
    """Run steps operation by operation; on a GPU each behind something that keeps it busy."""
    runner = rank.new_runner(eager=True)
    profiler = profile(runner)
    for i in range(1 + min(steps, 5)):
        if i == 1:  # the first one has compiled and warmed up
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
        name: of the step.
        plans: makes the next step's plan.
        ceilings: of the device; exchanges count as the bytes that the stand-ins move.
        steps: how many to time.
        eager: without CUDA graphs.

    Returns:
        the rows of the operations, and what to say about the step.
    """
    hits, served = rank.count_hits(plans()), rank.new_runner(eager)
    on_gpu, profiler = rank.device.type == "cuda", profile_steps(rank, plans, steps)
    # Several in a row, as they are served: the host launches one while the device runs another.
    ready = [[plans()] for _ in range(4 if on_gpu else 1)]
    seconds, launch = time_steps(served.run, ready, rank.device, steps)
    load = replace(next(iter(profiler.shapes)), hit=hits)
    profiler.shapes = Counter({load: profiler.steps})
    free = dict.fromkeys(("link", "net"), math.inf) | dict.fromkeys(
        ("link_latency", "net_latency"), 0.0
    )
    local = replace(ceilings, **free)  # type: ignore[arg-type]
    rows = what_bounds(profiler, rank.setup, local).rows
    floor = floor_seconds(step_ops(rank.setup, load), local)
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
    factor, layers = whole_model(rank, rows), rank.shape.config.num_hidden_layers
    whole = f"{name}, all {layers} layers at the same rates: {1e3 * seconds * factor:.4g} ms"
    return [{"step": name, **row} for row in rows], [note, *([whole] if factor != 1 else [])]


def whole_model(rank: Rank, rows: list[Row]) -> float:
    """Return how much longer a step of all layers takes, each kind as long as those measured."""
    kinds = []
    for c in (rank.shape.config, rank.config):
        moe = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
        every = c.num_hidden_layers
        kinds.append({"layers": every, "self_attn": every, "moe": moe, "mlp": every - moe})
    factor = {name: more / max(1, kinds[1][name]) for name, more in kinds[0].items()}
    longer = sum(row["ms"] * factor.get(row["operation"].split(".")[0], 1.0) for row in rows)
    return float(longer / sum(row["ms"] for row in rows))


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
    """Measure decode steps of some batch sizes, and one prefill step."""
    page = 2 * max(64, shape.world)
    rank = Rank(shape, device, max([b * (context + page) for b in batches] + [prefill + page]))
    held = (f"{each.num_bytes / 2**30:.4g} GiB" for each in (rank.model, rank.cache))
    report = Report("rank", setting={"rank": f"{shape.rank} of {shape.world}"})
    report.setting |= {
        "layers": rank.config.num_hidden_layers,
        "weights": f"{shape.weights} {next(held)}",
        "cache": f"{shape.cache} {next(held)}, {shape.kv_shard}",
        "exchanges": "moved locally" if shape.moves else "left out",
        "skew": shape.skew,
        "ceilings": ceilings.name,
    }
    kinds = [(f"decode {b} at {context}", (b, context, 1)) for b in batches]
    kinds += [(f"prefill {prefill}", (1, 0, prefill))] if prefill else []
    for name, what in kinds:
        rows, notes = measure_step(rank, name, partial(rank.plan, *what), ceilings, steps, eager)
        report.rows += rows
        report.notes += notes
    return report


def shape_of(args: argparse.Namespace, on_cpu: bool) -> RankShape:
    """Return what the flags ask for."""
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
    parser.add_argument("--world", type=at_least(1), default=8, help="ranks there would be")
    parser.add_argument("--rank", type=int, default=0, help="which of them this is")
    parser.add_argument("--layers", default="4", help="N: one dense and N - 1 MoE layers; or all")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1, 8, 128])
    parser.add_argument("--context", type=at_least(1), default=1024, help="cached tokens of each")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt, too")
    parser.add_argument("--weights", default="auto", choices=["auto", "fp8", "bf16", "fp32"])
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "fp8", "bf16", "fp32"])
    parser.add_argument("--kv-shard", default="none", choices=["none", "tokens"])
    parser.add_argument("--skew", type=float, default=0.0, help="of the experts (0: uniform)")
    parser.add_argument("--no-comm", action="store_true", help="leave exchanges out")
    parser.add_argument("--steps", type=at_least(1), default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--hardware", default="measure", help="its ceilings: measure, h100, h200")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--overlap-launches", action="store_true", help="begin them early")
    parser.add_argument("--threads", type=at_least(1), help="on a CPU (default: all)")
    add_program_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Make the share, measure, report."""
    args = parse_args(arguments)
    check_report(args)
    set_up_logging(args.debug)
    with join_world(args.device, name=flag) as mesh:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        set_launches(args.overlap_launches, mesh.device, "--overlap-launches")
        shape = shape_of(args, mesh.device.type == "cpu")
        what = (args.batch, args.context, args.prefill, args.steps, args.enforce_eager)
        report = rank_report(shape, mesh.device, hardware(args.hardware, mesh.device), *what)
        report.setting |= machine(1) | {"overlapping launches": args.overlap_launches}
    report.publish(args.json)
    return 0
