"""Start-up: checkpoint directory + settings + mesh -> an engine, phase by phase."""

import gc
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.fingerprint import digest_share, fingerprint
from dsv3.checkpoint.load import (
    fp8_weights,
    has_fp8_experts,
    has_fp8_weights,
    load_weights,
)
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.together import fail_together
from dsv3.distributed.watchdog import RUN
from dsv3.engine.agreement import check_same_model
from dsv3.engine.balance import Balancer, place_experts
from dsv3.engine.cuda_graphs import most_rows
from dsv3.engine.divergence import DivergenceCheck
from dsv3.engine.engine import Engine
from dsv3.engine.ignored import ignored_settings
from dsv3.engine.layer_check import LayerCheck
from dsv3.engine.lower_tiers import make_tiers
from dsv3.engine.memory import MemoryPlan, free_memory, plan_memory, weight_bytes
from dsv3.engine.runner import Runner
from dsv3.engine.step_plan import PlanChannel, StepPlan
from dsv3.errors import ConfigError
from dsv3.model.attention import absorb_limit
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_dispatch import DispatchSettings
from dsv3.parallel.expert_placement import Placement
from dsv3.parallel.weights import FP8, WeightFormat
from dsv3.settings import EngineConfig
from dsv3.text.tokenizer import Tokenizer
from dsv3_kernels import overlap_launches

log = logging.getLogger(__name__)

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COLUMNS_PER_THREAD = 512
_CACHE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Started:
    """One rank, ready to run.

    Attributes:
        engine: on rank 0; None on the others, which call `follow(runner, channel)`.
        plan: the memory plan.
        seconds: of each start-up phase.
    """

    mesh: Mesh
    config: ModelConfig
    runner: Runner
    channel: PlanChannel
    cache: CachePool
    plan: MemoryPlan
    engine: Engine | None
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def numerics_mode(settings: EngineConfig, source: Source, device: str) -> str:
    """Return float32, bfloat16 or fp8; `auto` is float32 on CPU, as the weights on CUDA."""
    config = source.config
    stored = "fp8" if has_fp8_weights(source) else "bfloat16"
    if settings.dtype == "fp8" and stored != "fp8":
        stale = (
            "" if source.declared.quantization is None else " (its quantization_config is stale)"
        )
        raise ConfigError(
            f"{settings.given('dtype')} multiplies FP8 weights and the checkpoint has none{stale}; "
            f"make some with convert.py --to fp8, or use {settings.named('dtype')}=bfloat16"
        )
    if settings.dtype != "auto":
        return settings.dtype
    if device == "cpu" or (stored == "bfloat16" and config.torch_dtype == "float32"):
        return "float32"
    return stored


def identify(path: Path, settings: EngineConfig, mesh: Mesh, config: ModelConfig | None) -> str:
    """Name a model and the dtype it computes in, without loading it."""
    with open_source(path, config, is_share=True, name=settings.named) as source:
        check_tensors(source)
        mode = numerics_mode(settings, source, mesh.device.type)
        return fingerprint(source, str(_TORCH_DTYPES.get(mode, mode)))


def context_limit(settings: EngineConfig, config: ModelConfig) -> int:
    """Return the longest context: the user's, the model's, or what dense attention covers."""
    limit = settings.max_seq_len or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise ConfigError(
            f"{settings.given('max_seq_len')} exceeds max_position_embeddings="
            f"{config.max_position_embeddings} of the model"
        )
    if config.index_topk is not None and limit > config.index_topk:
        if settings.max_seq_len:
            raise ConfigError(
                f"{settings.given('max_seq_len')} exceeds index_topk={config.index_topk}: sparse "
                "attention is not available yet, and below index_topk the model is exactly dense"
            )
        log.warning(
            "context limited to index_topk=%d tokens: sparse attention is not available yet, "
            "and up to there the model is exactly dense",
            config.index_topk,
        )
        limit = config.index_topk
    return limit


def start(
    path: Path,
    settings: EngineConfig,
    mesh: Mesh,
    config: ModelConfig | None = None,
    n_experts: int | None = None,
) -> Started:
    """Load a checkpoint on every rank and make it ready to run.

    Args:
        path: a checkpoint directory.
        settings: how to run it.
        mesh: this rank and its peers.
        config: the model, where the directory does not say.
        n_experts: routed experts the user expects, checked if given.

    Raises:
        ConfigError, CheckpointError: the model, the layout and the files do not fit together.
        RankError: another rank failed.
    """
    seconds: dict[str, float] = {}
    mesh.watch.enter("load")
    with _phase(seconds, "load"), ExitStack() as stack:
        with fail_together(mesh, "opening the checkpoint"):
            opened = open_source(path, config, is_share=True, name=settings.named)
            source = stack.enter_context(opened)
        check_same_model(mesh, source, settings.expert_placement)
        stack.enter_context(fail_together(mesh, "loading"))
        stack.enter_context(mesh.watch.counting(lambda: source.bytes_read))
        if mesh.layout.rank == 0 and source.config.warning:
            log.warning("%s", source.config.warning)
        setup = _set_up(source, settings, mesh, n_experts)
        if mesh.layout.rank == 0:
            has_fp8 = bool(fp8_weights(source))
            for line in ignored_settings(settings, source.config, mesh.layout, has_fp8):
                log.warning("%s", line)
            log.info("%s", setup.plan.describe())
        _limit_threads(source.config, mesh)
        set_launches(settings.overlap_launches, mesh.device, settings.named("overlap_launches"))
        dispatch = _dispatch(settings, source.config, setup.fmt, has_fp8_experts(source))
        if setup.placement is not None:  # a group's experts may be anywhere
            dispatch = replace(dispatch, groups=(1, 1))
        split_from = settings.split_from(mesh.device.type)
        model = Transformer(source.config, mesh, setup.fmt, dispatch, split_from, setup.placement)
        _log_cut_weights(model)
        load_weights(source, model.eval().targets(), mesh.layout)
        weights = b""
        if settings.disk_cache:
            weights = digest_share(source, mesh.layout.rank, mesh.layout.world_size)
        tokenizer = Tokenizer.load_optional(path) if mesh.layout.rank == 0 else None
    config, static = source.config, mesh.is_capturable and not settings.enforce_eager
    if mesh.device.type == "cuda" and not mesh.is_capturable and mesh.layout.rank == 0:
        log.info("no CUDA graphs: ranks that share a GPU exchange over Gloo")
    with _phase(seconds, "cache"):
        plan = _measured_plan(setup, settings, mesh, model, static)
        pages, host_pages = _agree_on_pages(mesh, plan)
        cache = CachePool(setup.layout, config.num_hidden_layers, pages + 1, mesh.device, mesh.tp)
    fmt = setup.fmt
    numerics = f"{fmt.dtype} {'fp8 products' if fmt.fp8_products else settings.weights}"
    mover, tiers = make_tiers(mesh, settings, config, cache, host_pages, weights, numerics)
    is_guarded = settings.check_every and mesh.world.size > 1
    guard = DivergenceCheck(mesh, settings.check_every) if is_guarded else None
    runner = Runner(model, cache, _decode_limit(settings, config), mover, static, guard)
    if log.isEnabledFor(logging.DEBUG):
        runner.layer_check = LayerCheck(model)
    channel = PlanChannel(mesh.control, mesh.watch)
    mesh.watch.enter("warm-up")
    _warm_up(runner, static, mesh.layout.dp, seconds)
    if setup.placement is not None:
        runner.balancer = Balancer(model, mesh, setup.placement, settings)
    mesh.watch.enter(RUN, may_rest=True)
    engine = None
    if mesh.layout.rank == 0:
        limit = setup.context_limit
        engine = Engine(config, settings, runner, cache, channel, tokenizer, limit, tiers)
    # What is there now stays: it need not be looked through whenever garbage is collected.
    gc.freeze()
    return Started(mesh, config, runner, channel, cache, plan, engine, seconds)


def _log_cut_weights(model: Transformer) -> None:
    """Name the kinds of weights that are stored in FP8 and cannot be held so on this rank."""
    kinds = sorted({re.sub(r"\.\d+", "", name) for name in model.cut_names})
    if kinds:
        log.info("FP8 weights whose shards cut blocks run dequantized: %s", ", ".join(kinds))


def set_launches(overlap: bool, device: torch.device, name: str) -> None:
    """Switch on overlapping launches of kernels if the setting `name` asks for them."""
    if not overlap:
        return
    try:
        overlap_launches(device)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


@dataclass(frozen=True)
class _SetUp:
    """What is decided before loading. `plan_for(free, device, activations)` makes memory plans."""

    fmt: WeightFormat
    layout: CacheLayout
    context_limit: int
    placement: Placement | None
    plan: MemoryPlan
    plan_for: Callable[..., MemoryPlan]


def _set_up(source: Source, settings: EngineConfig, mesh: Mesh, n_experts: int | None) -> _SetUp:
    """Hold model, files, layout and settings to each other, and plan the memory."""
    config = source.config
    mesh.layout.check(config)
    if mesh.layout.dp > 1 and settings.disk_cache:
        raise ConfigError(
            f"{settings.named('kv_disk_cache')} serves one data-parallel group, "
            f"dp={mesh.layout.dp} has more; use {settings.named('kv_host_cache')}, or "
            f"{settings.named('dp')}=1"
        )
    if n_experts not in (None, config.n_routed_experts):
        name = settings.named("n_experts")
        raise ConfigError(f"{name}={n_experts} but the model has {config.n_routed_experts}")
    check_tensors(source)
    if mesh.layout.rank == 0:
        for line in source_warnings(source):
            log.warning("%s", line)
    limit = context_limit(settings, config)
    fmt = _weight_format(source, settings, mesh)
    dtype = fmt.dtype
    stored = _CACHE_NAMES[dtype] if settings.kv_dtype == "auto" else settings.kv_dtype
    tp, tp_rank = mesh.layout.tp, mesh.layout.tp_rank
    layout = CacheLayout.make(config, settings.cache_form, settings.kv_shard, stored, tp, tp_rank)
    placement = place_experts(settings, config, mesh.layout)
    weights = weight_bytes(config, mesh, fmt, placement)
    host_free = free_memory(torch.device("cpu"), mesh.ranks_on_host)
    plan_for = partial(plan_memory, config, settings, layout, weights, limit, host_free=host_free)
    plan = plan_for(free_memory(mesh.device, mesh.ranks_on_host), mesh.device)
    return _SetUp(fmt, layout, limit, placement, plan, plan_for)


def _weight_format(source: Source, settings: EngineConfig, mesh: Mesh) -> WeightFormat:
    """Decide what weights are held in, and which of them in FP8."""
    mode = numerics_mode(settings, source, mesh.device.type)
    dtype = _TORCH_DTYPES.get(mode, torch.bfloat16)
    if mode != "fp8":
        kept = fp8_weights(source) if settings.weights == "fp8" else frozenset()
        return WeightFormat(dtype, mesh.device, kept)
    quantization = source.config.quantization
    ue8m0 = quantization is not None and quantization.scale_fmt == "ue8m0"
    return WeightFormat(dtype, mesh.device, fp8_weights(source), True, ue8m0)


def _measured_plan(
    setup: _SetUp, settings: EngineConfig, mesh: Mesh, model: Transformer, static: bool
) -> MemoryPlan:
    """Return the plan with `auto` or a share made exact by running the largest steps; on CUDA only.

    All that a step allocates counts: attention's partial results, buffers of exchanges, logits. A
    CPU's cache becomes resident only where it is written, so there the estimate is enough.

    A collective.
    """
    size = settings.cache_size
    if mesh.device.type != "cuda" or not size.depends_on_memory:
        return setup.plan
    cache = CachePool(setup.layout, model.config.num_hidden_layers, 2, mesh.device, mesh.tp)
    runner = Runner(model, cache, _decode_limit(settings, model.config), static=static)
    before, dp = torch.cuda.memory_allocated(mesh.device), mesh.layout.dp
    torch.cuda.reset_peak_memory_stats(mesh.device)
    rows, limit, page_size = settings.max_running, setup.context_limit, setup.layout.page_size
    runner.run([largest_step(rows, limit, page_size, settings.max_batch_tokens)] * dp)
    peak = torch.cuda.max_memory_allocated(mesh.device) - before
    torch.cuda.empty_cache()
    if static:  # CUDA graphs share memory that they keep: what the largest one takes
        held = torch.cuda.memory_reserved(mesh.device)
        runner.run([largest_step(most_rows(rows, dp), limit, page_size)] * dp)
        torch.cuda.empty_cache()
        peak += torch.cuda.memory_reserved(mesh.device) - held
    del cache, runner
    torch.cuda.empty_cache()
    free = free_memory(mesh.device, mesh.ranks_on_host) + setup.plan.weight_bytes
    plan = setup.plan_for(free, mesh.device, peak)
    if mesh.layout.rank == 0:
        log.info("%s", plan.describe())
    return plan


def largest_step(rows: int, limit: int, page_size: int, max_tokens: int = 0) -> StepPlan:
    """Return the step that takes most memory, all of it in page 1: only shapes count.

    So many sequences decode, one of them at the end of the longest context. Where there is room
    for more tokens, they are the end of a prompt as long, and all are scored.
    """
    rest = min(max(0, max_tokens - rows), limit)
    query_len = np.array([1] * rows + [rest] * (rest > 0), np.int32)
    context_len = np.zeros_like(query_len)
    context_len[rows - 1], context_len[-1] = limit - 1, limit - query_len[-1]
    pages = -(-limit // page_size)
    every, each = np.zeros(rows + rest, np.int32), np.full(len(query_len), pages, np.int32)
    plan = StepPlan.greedy(every, every, every[:, None])
    plan.query_len, plan.context_len, plan.page_count = query_len, context_len, each
    plan.pages, plan.temperature = np.ones(each.sum(), np.int32), np.ones_like(plan.top_p)
    if max_tokens:
        plan.target, plan.top_logprobs = every, every
    return plan


def _dispatch(
    settings: EngineConfig, config: ModelConfig, fmt: WeightFormat, fp8_experts: bool
) -> DispatchSettings:
    """Return how tokens come to their experts; by default in FP8 only if those are stored so."""
    fits, is_limited = config.hidden_size % 128 == 0, config.topk_method != "greedy"
    if settings.dispatch_dtype == "fp8" and not fits:
        raise ConfigError(
            f"{settings.given('dispatch_dtype')} has a scale per 128 values, "
            f"hidden_size={config.hidden_size} is no multiple of them; use bf16"
        )
    numerics = FP8 if fmt.fp8_products and fits and fp8_experts else None
    dtypes = {"auto": numerics, "bf16": torch.bfloat16, "fp8": FP8}
    return DispatchSettings(
        settings.moe_dispatch,
        dtypes[settings.dispatch_dtype],
        groups=(config.n_group, config.topk_group) if is_limited else (1, 1),
        ue8m0=fmt.ue8m0,
    )


def _limit_threads(config: ModelConfig, mesh: Mesh) -> None:
    """Take no more threads than a small model's products keep busy, unless the user chose.

    Every operation ends when its last thread does. Where other programs want the cores too, a
    second thread made decoding the demo model 16 times slower.
    """
    if mesh.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        useful = max(1, config.hidden_size // _COLUMNS_PER_THREAD)
        torch.set_num_threads(min(torch.get_num_threads(), useful))


def _warm_up(runner: Runner, static: bool, dp: int, seconds: dict[str, float]) -> None:
    """Run a first step; capture the graph of one sequence, others when they are needed."""
    with _phase(seconds, "warmup"):
        runner.run([_one_sequence(2 if static else 1)] * dp)
    if static:
        with _phase(seconds, "capture"):
            runner.run([_one_sequence(1)] * dp)


def _agree_on_pages(mesh: Mesh, plan: MemoryPlan) -> list[int]:
    """Return the fewest pages of the device and of the host that any rank planned. A collective."""
    mine = torch.tensor([plan.num_pages, plan.host_pages], dtype=torch.int64, device=mesh.device)
    return mesh.world.all_gather(mine).min(0).values.tolist()


def _decode_limit(settings: EngineConfig, config: ModelConfig) -> int:
    if settings.attn_impl == "naive":
        return 1
    if settings.attn_impl == "absorb":
        return config.max_position_embeddings
    return absorb_limit(config)


def _one_sequence(count: int) -> StepPlan:
    """Return a step of `count` tokens in page 1.

    One token opens the connections between ranks and the libraries' thread pools.
    """
    none = np.zeros(count, np.int32)
    return StepPlan.greedy(none, none[:1], none[:1, None] + np.int32(1))
