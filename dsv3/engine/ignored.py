"""Warnings about settings that have no effect with this model, world size or other settings."""

from collections.abc import Iterator
from dataclasses import fields

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.settings import EngineConfig

_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}
# Values that ask for the behavior of a single rank, or for none; they are never warned about.
_HARMLESS = {
    "sequence_parallel": 0,
    "check_every": 0,
    "moe_dispatch": "allreduce",
    "pipeline_depth": 0,
}
_OF_EXPERTS = ("expert_placement", "redundant_experts", "rebalance_every", "record_expert_load")


def ignored_settings(
    settings: EngineConfig, config: ModelConfig, layout: ParallelConfig, has_fp8: bool
) -> Iterator[str]:
    """Yield a warning for every setting that was given and changes nothing.

    Args:
        settings: as given.
        config: the model.
        layout: the world.
        has_fp8: the checkpoint holds weights in FP8.
    """
    for name, reason in _reasons(settings, config, layout, has_fp8):
        value = getattr(settings, name)
        if value not in (_DEFAULTS[name], _HARMLESS.get(name)):
            yield f"{settings.given(name)} changes nothing: {reason}"


def _reasons(
    settings: EngineConfig, config: ModelConfig, layout: ParallelConfig, has_fp8: bool
) -> Iterator[tuple[str, str]]:
    """Yield every setting without effect, given or not, and the reason."""
    if layout.dp == 1:
        for name in ("moe_dispatch", "dispatch_dtype"):
            yield name, f"without {settings.named('dp')} every rank has all tokens already"
    if layout.tp == 1:
        yield "sequence_parallel", f"with {settings.named('tp')}=1 there are no ranks to split over"
    elif settings.attn_impl == "naive":
        yield "kv_shard", f"{settings.given('attn_impl')} caches heads, which are split over tp"
    if not settings.prefix_reuse:
        yield "eviction", f"{settings.given('prefix_reuse')} keeps nothing to evict"
    if layout.world_size == 1:
        yield "check_every", "there is one rank, and none to compare with"
        yield "rebalance_every", "there is one rank, which has all experts"
    yield from _drafting_reasons(settings)
    yield from _model_reasons(config, has_fp8)


def _model_reasons(config: ModelConfig, has_fp8: bool) -> Iterator[tuple[str, str]]:
    if not config.has_indexer:
        yield "index_dtype", "the model has no indexer"
    if config.first_k_dense_replace >= config.num_hidden_layers:
        for name in _OF_EXPERTS:
            yield name, "the model has no routed experts"
    if not has_fp8 and config.integers is None:
        yield "weights", "the checkpoint has no quantized weights to keep"


def _drafting_reasons(settings: EngineConfig) -> Iterator[tuple[str, str]]:
    if settings.speculative_tokens:
        yield "pipeline_depth", "a step begins where the drafts of the one before were accepted"
    else:
        for name in ("speculative_method", "speculative_adaptive"):
            yield name, f"{settings.given('speculative_tokens')} drafts nothing"
