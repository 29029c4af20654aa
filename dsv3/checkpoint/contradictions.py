"""Report contradictions between a config and the stored tensors, with both values.

Where the tensors alone can decide (the head, FP8 or not), they do, and a warning says so. A
different number of layers or experts, or another size, is an error.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv3.checkpoint.directory import unused_adapter
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.spelling import EMBED, HEAD
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(?:mlp\.experts\.(\d{1,9})\.)?(.*)")
_MTP_TENSORS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
_COMPARED_ROWS = 64


@dataclass(slots=True)
class _Layers:
    """Layers found in tensor names."""

    plain: set[int] = field(default_factory=set)
    mtp: set[int] = field(default_factory=set)
    sparse: set[int] = field(default_factory=set)
    num_experts: int = 0

    @classmethod
    def of(cls, source: Source) -> "_Layers":
        layers = cls()
        for name in source.tensors:
            match = _LAYER.fullmatch(name)
            if match is None:
                continue
            layer = int(match[1])
            layers.plain.add(layer)
            if match[2] is not None:
                layers.sparse.add(layer)
                layers.num_experts = max(layers.num_experts, int(match[2]) + 1)
            elif match[3].startswith(_MTP_TENSORS):
                layers.mtp.add(layer)
        layers.plain -= layers.mtp
        return layers


def check_sizes(source: Source) -> None:
    """Raise CheckpointError if a number of layers or experts, or a size, differs in the files."""
    config = source.config
    layers = _Layers.of(source)
    if layers.plain:
        _check_layers(source, layers)
    elif layers.mtp:
        raise CheckpointError(
            f"{source.path}: holds layers for multi-token prediction only, as for speculative "
            "decoding; use the files of the model itself"
        )
    if layers.num_experts not in (0, config.n_routed_experts):
        raise _contradiction(
            source, f"{layers.num_experts} routed experts in a layer", "n_routed_experts"
        )
    for layer in sorted(layers.plain):
        _check_kind(source, layer, layer in layers.sparse)
    for name, stored in _stored_sizes(source):
        if stored != getattr(config, name):
            raise _contradiction(source, f"{name}={stored}", name)


def _check_layers(source: Source, layers: _Layers) -> None:
    config = source.config
    num_layers = max(layers.plain) + 1
    num_mtp = len(layers.mtp)
    mtp = f"{num_mtp} for multi-token prediction"
    if num_layers != config.num_hidden_layers:
        names = ["num_hidden_layers"] + ["num_nextn_predict_layers"] * (num_mtp > 0)
        note = f" (of the {num_layers + num_mtp}, {mtp})" if num_mtp else ""
        raise _contradiction(source, f"{num_layers + num_mtp} layers", *names, note=note)
    if num_mtp > config.num_nextn_predict_layers:
        have = f"{num_layers} layers and {mtp}"
        raise _contradiction(source, have, "num_nextn_predict_layers")


def _check_kind(source: Source, layer: int, is_sparse: bool) -> None:
    """Raise CheckpointError if only one of files and config has routed experts in a layer."""
    if is_sparse == source.config.is_moe_layer(layer):
        return
    dense = f"model.layers.{layer}.mlp.gate_proj."
    if not is_sparse and not any(name.startswith(dense) for name in source.tensors):
        return  # reported as a missing tensor
    have = "routed experts" if is_sparse else "no routed experts"
    raise _contradiction(
        source, f"{have} in layer {layer}", "first_k_dense_replace", "moe_layer_freq"
    )


def _stored_sizes(source: Source) -> Iterator[tuple[str, int | None]]:
    """Yield config fields with their values according to the shapes of stored tensors."""
    config: ModelConfig = source.config
    first_sparse = next(filter(config.is_moe_layer, range(config.num_hidden_layers)), 0)
    for name, tensor in (
        ("vocab_size", EMBED),
        ("hidden_size", "model.norm.weight"),
        ("kv_lora_rank", "model.layers.0.self_attn.kv_a_layernorm.weight"),
        ("q_lora_rank", "model.layers.0.self_attn.q_a_layernorm.weight"),
        ("intermediate_size", "model.layers.0.mlp.gate_proj.weight"),
        ("moe_intermediate_size", f"model.layers.{first_sparse}.mlp.experts.0.gate_proj.weight"),
    ):
        info = source.tensors.get(tensor)
        if info is not None and info.shape:
            yield name, info.shape[0]
    if "model.layers.0.self_attn.q_proj.weight" in source.tensors:
        yield "q_lora_rank", None


def _contradiction(source: Source, have: str, *names: str, note: str = "") -> CheckpointError:
    config = "config.json" if (source.path / "config.json").is_file() else "the given config"
    values = " and ".join(f"{name}={getattr(source.config, name)}" for name in names)
    return CheckpointError(
        f"{source.path}: the files have {have}, {config} says {values}{note}; correct it, or use "
        "the files that belong to it"
    )


def source_warnings(source: Source) -> Iterator[str]:
    """Yield a warning for each difference between the config and how the directory is read.

    If the config ties a stored head, a few rows are compared with the embedding; if only some rank
    files are present, rows of the first of them.
    """
    declared = source.declared
    config = source.config
    if declared.tie_word_embeddings and not config.tie_word_embeddings and _heads_differ(source):
        yield (
            f"{source.path}: tie_word_embeddings is true, but {HEAD} is stored and differs from "
            "the embedding; the stored head is used"
        )
    if declared.quantization is not None and config.quantization is None:
        yield (
            f"{source.path}: quantization_config is stale: no weight is stored in FP8; the weights "
            "are used as they are stored"
        )
    if declared.quantization is None and config.quantization is not None:
        yield (
            f"{source.path}: the config has no quantization_config, but FP8 weights with a scale "
            "per 128 x 128 block are stored; they are read as FP8"
        )
    yield from _integer_warnings(source)
    if unused_adapter(source.path) is not None:
        yield (
            f"{source.path}: {unused_adapter(source.path)} is not applied; if the weights do "
            "not contain it yet, merge it (peft: merge_and_unload)"
        )
    if source.num_unused:
        yield (
            f"{source.path}: the tensors of an image encoder ({source.num_unused}) are ignored; "
            "only text prompts are supported"
        )


def _integer_warnings(source: Source) -> Iterator[str]:
    declared = source.declared.integers
    stored = source.config.integers
    if declared is not None and stored is None:
        yield (
            f"{source.path}: quantization_config is stale: no weight is stored as integers; the "
            "weights are used as they are stored"
        )
    if declared is not None and stored is not None and declared.method != stored.method:
        yield (
            f"{source.path}: quantization_config says quant_method={declared.method}, but the "
            f"weights are stored as {stored.method} names them; they are read as stored"
        )
    if declared is None and stored is not None:
        yield (
            f"{source.path}: the config has no quantization_config of integers, but integer "
            "weights are stored; they are read as such"
        )


def _heads_differ(source: Source) -> bool:
    embed = source.tensors[EMBED]
    head = source.tensors[HEAD]
    if (embed.dtype, embed.shape) != (head.dtype, head.shape):
        return True
    (start, stop), *cols = embed.pieces[0].region  # rows in a file that is present
    rows = ((start, min(stop, start + _COMPARED_ROWS)), *cols)
    return source.read(EMBED, rows) != source.read(HEAD, rows)
