"""Start-up: checkpoint directory + settings + mesh -> an engine, phase by phase."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dsv3.cache.pool import CachePool
from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.identity import model_fingerprint
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.watchdog import RUN
from dsv3.engine.agreement import agree_on_model
from dsv3.engine.balance import Balancer
from dsv3.engine.compile_ahead import compile_ahead
from dsv3.engine.divergence import DivergenceCheck
from dsv3.engine.engine import Engine
from dsv3.engine.layer_check import LayerCheck
from dsv3.engine.lower_tiers import make_tiers
from dsv3.engine.measured_memory import agree_on_pages, measured_plan
from dsv3.engine.memory import MemoryPlan, free_memory
from dsv3.engine.runner import Runner
from dsv3.engine.setup import TORCH_DTYPES, Setup, decide, numerics_mode
from dsv3.engine.speculation import Speculation
from dsv3.engine.step_plan import PlanChannel, StepPlan
from dsv3.errors import ConfigError
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.transformer import Transformer
from dsv3.settings import EngineConfig
from dsv3.text.tokenizer import Tokenizer
from dsv3_kernels import overlap_launches

log = logging.getLogger(__name__)


@dataclass
class Started:
    """One rank, ready to run.

    Attributes:
        engine: on rank 0; None on the others, which call `follow(runner, channel)`.
        plan: the memory plan.
        speculation: how tokens are drafted.
        seconds: of each start-up phase.
    """

    mesh: Mesh
    config: ModelConfig
    runner: Runner
    channel: PlanChannel
    cache: CachePool
    plan: MemoryPlan
    engine: Engine | None
    speculation: Speculation
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Loaded:
    """A loaded model.

    Attributes:
        setup: how it runs.
        plan: the memory plan, made before loading.
        model: with its weights.
        tokenizer: on rank 0, if the checkpoint has one.
        identity: identity of the weights; 0 if nothing needed it.
    """

    setup: Setup
    plan: MemoryPlan
    model: Transformer
    tokenizer: Tokenizer | None
    identity: int


def start(
    path: Path,
    settings: EngineConfig,
    mesh: Mesh,
    config: ModelConfig | None = None,
    n_experts: int | None = None,
) -> Started:
    """Load a checkpoint on every rank and make it ready to run. A collective.

    Args:
        path: a checkpoint directory.
        settings: how to run it.
        mesh: this rank and its peers.
        config: the model, if the directory has no configuration.
        n_experts: routed experts that the user expects, checked if given.

    Raises:
        ConfigError, CheckpointError: the model, the layout and the files do not fit together.
        RankError: another rank failed.
    """
    seconds: dict[str, float] = {}
    mesh.watchdog.enter("load")
    with _phase(seconds, "load"):
        loaded = _load(path, settings, mesh, config, n_experts)
    setup = loaded.setup
    model = loaded.model
    mesh.watchdog.enter("compile")
    with _phase(seconds, "compile"):
        compile_ahead(setup, mesh)
    static = mesh.is_capturable and not settings.enforce_eager
    if mesh.device.type == "cuda" and not mesh.is_capturable and mesh.layout.rank == 0:
        log.info("no CUDA graphs: ranks that share a GPU exchange over Gloo")
    with _phase(seconds, "cache"):
        plan = measured_plan(loaded.plan, setup, mesh, model, static)
        num_pages, num_host_pages = agree_on_pages(mesh, plan)
        cache = CachePool(setup.layout, num_pages + 1, mesh.device, mesh.tp)
    products: str = settings.weights
    if setup.fmt.fp8_products or setup.fmt.int8_products:
        products = f"{setup.fmt.numerics} products"
    mover, tiers = make_tiers(
        mesh,
        settings,
        model.config,
        cache,
        num_host_pages,
        loaded.identity,
        numerics=f"{setup.fmt.dtype} {products}",
    )
    is_checked = settings.check_every and mesh.world.size > 1
    check = DivergenceCheck(mesh, settings.check_every) if is_checked else None
    layer_check = LayerCheck(model) if log.isEnabledFor(logging.DEBUG) else None
    rule = AbsorbRule.make(model.config, settings)
    drafts = setup.speculation.has_mtp
    runner = Runner(model, cache, rule, mover, static, check, layer_check, drafts)
    channel = PlanChannel(mesh.control, mesh.watchdog)
    mesh.watchdog.enter("warm-up")
    _warm_up(runner, static, mesh.layout.dp, seconds)
    if setup.placement is not None:
        runner.balancer = Balancer(model, mesh, setup.placement, settings)
    mesh.watchdog.enter(RUN, may_rest=True)
    engine = None
    if mesh.layout.rank == 0:
        engine = Engine(
            model.config,
            settings,
            runner,
            cache,
            channel,
            loaded.tokenizer,
            setup.context_limit,
            tiers,
            setup.speculation,
        )
    return Started(
        mesh, model.config, runner, channel, cache, plan, engine, setup.speculation, seconds
    )


def _load(
    path: Path,
    settings: EngineConfig,
    mesh: Mesh,
    config: ModelConfig | None,
    n_experts: int | None,
) -> _Loaded:
    """Open a checkpoint, decide how it runs, and load this rank's share."""
    rank = mesh.layout.rank
    with ExitStack() as stack:
        with collective_errors(mesh, "opening the checkpoint"):
            opened = open_source(path, config, is_share=True, name=settings.named)
            source = stack.enter_context(opened)
            check_tensors(source)
        identity = agree_on_model(
            mesh, source, settings.expert_placement, settings.disk_cache is not None
        )
        stack.enter_context(collective_errors(mesh, "loading"))
        stack.enter_context(mesh.watchdog.counting(lambda: source.bytes_read))
        setup = decide(source, settings, mesh, n_experts)
        plan = setup.plan_memory(mesh, free_memory(mesh.device, mesh.ranks_on_host))
        if rank == 0:
            log.info("%s", plan.describe())
        set_launches(settings.overlap_launches, mesh.device, settings.named("overlap_launches"))
        sp_min_tokens = settings.sp_min_tokens(mesh.device.type)
        model = Transformer(
            source.config,
            mesh,
            setup.fmt,
            setup.dispatch,
            sp_min_tokens,
            setup.placement,
            setup.speculation.has_mtp,
        )
        _log_cut_weights(model)
        load_weights(source, model.eval().targets(), mesh.layout)
        model.pack_weights()
        tokenizer = Tokenizer.load_optional(path) if rank == 0 else None
    return _Loaded(setup, plan, model, tokenizer, identity)


def identify(path: Path, settings: EngineConfig, mesh: Mesh, config: ModelConfig | None) -> str:
    """Return the fingerprint of a model and of its numerics, without loading it."""
    with open_source(path, config, is_share=True, name=settings.named) as source:
        check_tensors(source)
        mode = numerics_mode(settings, source, mesh.device.type)
        numerics = str(TORCH_DTYPES.get(mode, mode))
        if source.config.integers is not None:  # products of held integers round activations
            numerics += f" {settings.weights}"
        return model_fingerprint(source, numerics)


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _log_cut_weights(model: Transformer) -> None:
    """Name the kinds of weights that are stored quantized and cannot be held so on this rank."""
    kinds = sorted({re.sub(r"\.\d+", "", name) for name in model.cut_names})
    if kinds:
        log.info("quantized weights that run dequantized on this rank: %s", ", ".join(kinds))


def set_launches(overlap: bool, device: torch.device, name: str) -> None:
    """Switch on overlapping launches of kernels if the setting `name` asks for them."""
    if not overlap:
        return
    try:
        overlap_launches(device)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _warm_up(runner: Runner, static: bool, num_groups: int, seconds: dict[str, float]) -> None:
    """Run a first step; capture the graph of one sequence, others when they are needed."""
    with _phase(seconds, "warmup"):
        runner.run([_one_token(is_scored=static)] * num_groups)
    if static:
        with _phase(seconds, "capture"):
            for _ in range(2):  # the second one is a replay
                runner.run([_one_token()] * num_groups)


def _one_token(is_scored: bool = False) -> StepPlan:
    """Return a step of one token in page 1; a scored one runs eagerly.

    It opens the connections between ranks and the libraries' thread pools.
    """
    zero = np.zeros(1, np.int32)
    plan = StepPlan.greedy(zero, zero, zero[:, None] + np.int32(1))
    plan.top_logprobs = zero - np.int32(not is_scored)
    return plan
