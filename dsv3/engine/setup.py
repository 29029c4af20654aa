"""Decisions of the start-up, before anything is loaded: numerics, formats, limits, placement."""

import logging
from dataclasses import dataclass, replace

import torch

from dsv3.cache.layout import CacheLayout
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.load import (
    bf16_vectors,
    fp8_weights,
    has_fp8_experts,
    has_fp8_weights,
    has_int8_rows,
    integer_weights,
)
from dsv3.checkpoint.reader import Source
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.engine.balance import place_experts
from dsv3.engine.ignored import ignored_settings
from dsv3.engine.memory import MemoryPlan, free_memory, plan_memory, weight_bytes
from dsv3.engine.speculation import NO_DRAFTS, Speculation
from dsv3.errors import ConfigError
from dsv3.parallel.expert_placement import Placement
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weight_format import WeightFormat
from dsv3.settings import CacheDtype, EngineConfig
from dsv3_kernels import int_gemm
from dsv3_kernels.fp8_format import BLOCK, FP8

log = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CACHE_NAMES: dict[torch.dtype, CacheDtype] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Setup:
    """Decisions about a model on this rank: numerics, cache, dispatch.

    Attributes:
        config: the model.
        settings: as the user gave them.
        fmt: format of the weights.
        layout: geometry and format of this rank's cache.
        context_limit: longest context of a request, in tokens.
        placement: ranks of the experts; None for equal ranges.
        dispatch: how tokens reach their experts.
        weight_bytes: bytes of this rank's weights.
        speculation: how tokens are drafted.
    """

    config: ModelConfig
    settings: EngineConfig
    fmt: WeightFormat
    layout: CacheLayout
    context_limit: int
    placement: Placement | None
    dispatch: DispatchSettings
    weight_bytes: int
    speculation: Speculation = NO_DRAFTS

    def plan_memory(self, mesh: Mesh, free: int, activations: int | None = None) -> MemoryPlan:
        """Return the memory plan of this rank.

        Args:
            mesh: this rank.
            free: bytes that it may use on its device.
            activations: bytes that the largest steps need, if they were measured.
        """
        plan = plan_memory(
            self.settings,
            self.layout,
            self.weight_bytes,
            self.context_limit,
            free,
            mesh.device,
            activations,
            host_free=free_memory(torch.device("cpu"), mesh.ranks_on_host),
        )
        return replace(plan, kept=self.fmt.kept)


def decide(source: Source, settings: EngineConfig, mesh: Mesh, n_experts: int | None) -> Setup:
    """Check that model, files, layout and settings fit together, and decide how the model runs.

    Args:
        source: the open checkpoint.
        settings: the user's.
        mesh: this rank and its peers.
        n_experts: routed experts that the user expects; None for any number.

    Raises:
        ConfigError, CheckpointError: they do not fit together.
    """
    config = source.config
    mesh.layout.check(config)
    if settings.disk_cache:
        _check_disk_cache(settings, config, mesh.layout)
    if n_experts not in (None, config.n_routed_experts):
        name = settings.named("n_experts")
        raise ConfigError(f"{name}={n_experts} but the model has {config.n_routed_experts}")
    if mesh.layout.rank == 0:
        _warn(source, settings, mesh)
    fmt = weight_format(source, settings, mesh)
    placement = place_experts(settings, config, mesh.layout)
    dispatch = dispatch_settings(settings, config, fmt, has_fp8_experts(source))
    if placement is not None:  # a group's experts may be anywhere
        dispatch = replace(dispatch, groups=(1, 1))
    speculation = Speculation.decide(settings, source, placement)
    if mesh.layout.rank == 0 and speculation.num_drafts:
        maker = (
            "by the MTP layer" if speculation.has_mtp else "from earlier occurrences in the text"
        )
        log.info("drafts: up to %d tokens a step, %s", speculation.num_drafts, maker)
    return Setup(
        config=config,
        settings=settings,
        fmt=fmt,
        layout=CacheLayout.make(
            config,
            settings.cache_form,
            settings.kv_shard,
            _CACHE_NAMES[fmt.dtype] if settings.kv_dtype == "auto" else settings.kv_dtype,
            mesh.layout.tp,
            mesh.layout.tp_rank,
            None if settings.index_dtype == "auto" else settings.index_dtype,
            speculation.has_mtp,
        ),
        context_limit=context_limit(settings, config),
        placement=placement,
        dispatch=dispatch,
        weight_bytes=weight_bytes(config, mesh, fmt, placement, speculation.has_mtp),
        speculation=speculation,
    )


def _check_disk_cache(settings: EngineConfig, config: ModelConfig, layout: ParallelConfig) -> None:
    """Raise ConfigError if pages cannot be kept on disk."""
    name = settings.named("kv_disk_cache")
    if layout.dp > 1:
        raise ConfigError(
            f"{name} serves one data-parallel group, dp={layout.dp} has more; use "
            f"{settings.named('kv_host_cache')}, or {settings.named('dp')}=1"
        )
    if config.has_indexer and settings.cache_form == "heads":
        raise ConfigError(
            f"{name} does not keep the indexer's keys beside heads ({settings.given('attn_impl')});"
            f" use {settings.named('attn_impl')}=auto, or {settings.named('kv_host_cache')}"
        )


def _warn(source: Source, settings: EngineConfig, mesh: Mesh) -> None:
    """Log contradictions in a checkpoint, and settings that change nothing."""
    if source.config.warning:
        log.warning("%s", source.config.warning)
    for line in source_warnings(source):
        log.warning("%s", line)
    for line in ignored_settings(settings, source.config, mesh.layout, bool(fp8_weights(source))):
        log.warning("%s", line)


def numerics_mode(settings: EngineConfig, source: Source, device: str) -> str:
    """Return float32, bfloat16, fp8 or int8.

    `auto` is float32 on a CPU, on CUDA the stored format, and bfloat16 for integers.
    """
    config = source.config
    stored = "fp8" if has_fp8_weights(source) else "bfloat16"
    if settings.dtype == "fp8" and stored != "fp8":
        is_stale = source.declared.quantization is not None
        stale = " (its quantization_config is stale)" if is_stale else ""
        raise ConfigError(
            f"{settings.given('dtype')} multiplies FP8 weights and the checkpoint has none{stale}; "
            f"make some with convert.py --to fp8, or use {settings.named('dtype')}=bfloat16"
        )
    if settings.dtype == "int8" and not has_int8_rows(source):
        raise ConfigError(
            f"{settings.given('dtype')} multiplies int8 weights with a scale per row and the "
            f"checkpoint has none; make some with convert.py --to int8, or use "
            f"{settings.named('dtype')}=bfloat16"
        )
    if settings.dtype != "auto":
        return settings.dtype
    if device == "cpu" or (stored == "bfloat16" and config.torch_dtype == "float32"):
        return "float32"
    return stored


def weight_format(source: Source, settings: EngineConfig, mesh: Mesh) -> WeightFormat:
    """Return the format that weights are held in, with the names of those kept quantized."""
    mode = numerics_mode(settings, source, mesh.device.type)
    dtype = TORCH_DTYPES.get(mode, torch.bfloat16)
    keeps_fp8 = mode == "fp8" or settings.weights in ("fp8", "stored")
    quantization = source.config.quantization
    on_cpu = not int_gemm.uses_triton(mesh)
    widths = _kept_widths(settings, dtype)
    if mode == "int8":
        widths = tuple({8, *widths})
    return WeightFormat(
        dtype,
        mesh.device,
        fp8_names=fp8_weights(source) if keeps_fp8 else frozenset(),
        fp8_products=mode == "fp8",
        ue8m0=mode == "fp8" and quantization is not None and quantization.scale_fmt == "ue8m0",
        # Their products with bfloat16 activations are exact in float32; a CPU casts to it first.
        bf16_vectors=bf16_vectors(source)
        if dtype == torch.bfloat16 and not on_cpu
        else frozenset(),
        integers=integer_weights(source, widths, exact=on_cpu),
        int8_products=mode == "int8",
        cpu_products=on_cpu and mode != "int8",  # these round activations to bfloat16
    )


def _kept_widths(settings: EngineConfig, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bits of the integer weights that are held as they are stored."""
    if settings.weights == "auto":
        return () if dtype == torch.float32 else (4, 8)
    return {"stored": (4, 8), "int8": (8,), "int4": (4,)}.get(settings.weights, ())


def context_limit(settings: EngineConfig, config: ModelConfig) -> int:
    """Return the longest context: the user's, or the model's."""
    limit = settings.max_seq_len or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise ConfigError(
            f"{settings.given('max_seq_len')} exceeds max_position_embeddings="
            f"{config.max_position_embeddings} of the model"
        )
    return limit


def dispatch_settings(
    settings: EngineConfig, config: ModelConfig, fmt: WeightFormat, has_fp8_experts: bool
) -> DispatchSettings:
    """Return how tokens reach their experts; by default in FP8 only if the experts are in FP8."""
    has_whole_blocks = config.hidden_size % BLOCK == 0
    if settings.dispatch_dtype == "fp8" and not has_whole_blocks:
        raise ConfigError(
            f"{settings.given('dispatch_dtype')} has a scale per {BLOCK} values, "
            f"hidden_size={config.hidden_size} is not a multiple of them; use bf16"
        )
    is_fp8 = fmt.fp8_products and has_whole_blocks and has_fp8_experts
    dtypes = {"auto": FP8 if is_fp8 else None, "bf16": torch.bfloat16, "fp8": FP8}
    is_limited = config.topk_method != "greedy"
    return DispatchSettings(
        settings.moe_dispatch,
        dtypes[settings.dispatch_dtype],
        groups=(config.n_group, config.topk_group) if is_limited else (1, 1),
        ue8m0=fmt.ue8m0,
    )
