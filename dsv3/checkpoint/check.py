"""Check the names, dtypes and shapes of an open checkpoint against its config."""

import math
from collections.abc import Mapping

from dsv3.checkpoint.contradictions import check_sizes
from dsv3.checkpoint.integers import IntegerForm, check_integers, integer_form
from dsv3.checkpoint.names import scale_name, weight_name
from dsv3.checkpoint.reader import Source, TensorInfo
from dsv3.checkpoint.sharding import (
    FLOAT_DTYPES,
    FP8_DTYPE,
    SCALE_DTYPES,
    TensorSpec,
    scale_shape,
    tensor_specs,
)
from dsv3.checkpoint.stored_quantization import stated_kind
from dsv3.config import ModelConfig
from dsv3.config_indexer import SHARED
from dsv3.errors import CheckpointError

_HEADS = "num_attention_heads"
# Config fields that determine shapes which `check_sizes` does not compare, by tensor name.
_FIELDS = {
    ".q_proj.weight": (_HEADS, "qk_nope_head_dim", "qk_rope_head_dim"),
    ".q_b_proj.weight": (_HEADS, "qk_nope_head_dim", "qk_rope_head_dim"),
    ".kv_a_proj_with_mqa.weight": ("kv_lora_rank", "qk_rope_head_dim"),
    ".kv_b_proj.weight": (_HEADS, "qk_nope_head_dim", "v_head_dim"),
    ".o_proj.weight": (_HEADS, "v_head_dim"),
    ".shared_experts.gate_proj.weight": ("n_shared_experts", "moe_intermediate_size"),
    ".indexer.wq_b.weight": ("index_n_heads", "index_head_dim"),
    ".indexer.wk.weight": ("index_head_dim",),
}


def check_tensors(source: Source) -> tuple[str, ...]:
    """Check that no tensor is missing, unknown or misshapen.

    Returns:
        the weights that may be absent and are: MTP layers (some copies of the published models
        drop them), the copies of embedding and head in them, and a head tied to the embedding.

    Raises:
        CheckpointError: naming the first wrong tensor, or a size that contradicts the config.
    """
    check_sizes(source)
    specs = tensor_specs(source.config)
    for name in source.tensors:
        _check_known(source, specs, name)
    absent = tuple(spec.name for spec in specs.values() if not _check_weight(source, spec))
    for name in absent:
        if not _may_be_absent(source, specs[name]):
            raise CheckpointError(f"{source.path}: tensor {name} is missing")
    return absent


def _may_be_absent(source: Source, spec: TensorSpec) -> bool:
    if spec.name == "lm_head.weight":
        return source.config.tie_word_embeddings
    if not spec.mtp:
        return False
    if spec.name.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
        return True
    layer = ".".join(spec.name.split(".")[:3])
    return f"{layer}.eh_proj.weight" not in source.tensors


def _check_known(source: Source, specs: Mapping[str, TensorSpec], name: str) -> None:
    weight = weight_name(name)
    if name in specs:
        return
    if weight is not None and weight in specs:
        form = integer_form(source.tensors, weight, specs[weight].shape)
        names = (scale_name(weight),) if form is None else form.names(weight)
        if name in names and (form is not None or weight in source.tensors):
            return
        if form is not None:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name} is stored in addition to {names[0]}; only "
                f"{', '.join(names)} belong to an int{form.kind.bits} weight"
            )
    if weight is not None and weight in source.tensors and weight in specs:
        kind = source.tensors[weight].dtype
        raise CheckpointError(
            f"{source.file_of(name)}: tensor {name} is not part of this model: {weight} is stored, "
            f"too, as {kind}"
        )
    absent = f": the weight that it belongs to, {weight}, is absent; fetch the files again"
    hint = absent if weight in specs else _hint(source, name)
    raise CheckpointError(f"{source.file_of(name)}: tensor {name} is not part of this model{hint}")


def _hint(source: Source, name: str) -> str:
    """Return the config field that excludes a tensor, where the name shows it."""
    config = source.config
    if ".indexer." in name:
        return _indexer_hint(config, name)
    if name.endswith(".e_score_correction_bias"):
        return f": the config says topk_method={config.topk_method}"
    if ".shared_experts." in name:
        return f": the config says n_shared_experts={config.n_shared_experts}"
    if name.endswith("_proj.bias"):
        return ": no model of the family has biases in its projections"
    return ""


def _indexer_hint(config: ModelConfig, name: str) -> str:
    if not config.has_indexer:
        return f": it belongs to sparse attention, the config says {config.model_type}"
    layer = name.removeprefix("model.layers.").partition(".")[0]
    if layer.isdecimal() and config.indexer_kind(int(layer)) == SHARED:
        return f": the config says that layer {layer} shares an earlier layer's selection"
    return ""


def _check_weight(source: Source, spec: TensorSpec) -> bool:
    """Check the tensors of a weight; return False if it is absent."""
    form = integer_form(source.tensors, spec.name, spec.shape)
    if form is not None:
        check_integers(source, spec.name, spec.shape, form, spec.quantizable)
        _check_kind(source, spec, form)
        return True
    if spec.name not in source.tensors:
        return False
    _check_plain_weight(source, spec, source.tensors[spec.name])
    return True


def _check_kind(source: Source, spec: TensorSpec, form: IntegerForm) -> None:
    """Raise CheckpointError if the config has no such integers."""
    declared = source.declared.integers
    if declared is None:
        return
    kind = stated_kind(form, spec.shape[1], declared.kinds)
    if kind not in declared.kinds:
        name = form.names(spec.name)[0]
        raise CheckpointError(
            f"{source.file_of(name)}: tensor {name} has {kind}, but quantization_config says "
            f"{' or '.join(map(str, declared.kinds))}; correct it"
        )


def _check_plain_weight(source: Source, spec: TensorSpec, info: TensorInfo) -> None:
    """Check a weight in floats or FP8."""
    file = source.file_of(spec.name)
    scale = scale_name(spec.name)
    _check_shape(source, info, spec.shape)
    if info.dtype in FLOAT_DTYPES:
        if spec.name.endswith(".weight") and scale in source.tensors:
            raise CheckpointError(
                f"{file}: tensor {spec.name} is {info.dtype}, but {scale} is stored, too; if the "
                "weight is dequantized, remove its scales from the files"
            )
        return
    if info.dtype != FP8_DTYPE or not spec.quantizable:
        kinds = FLOAT_DTYPES + (FP8_DTYPE,) * spec.quantizable
        raise CheckpointError(
            f"{file}: tensor {spec.name} cannot be of type {info.dtype}; it is read as one of "
            f"{', '.join(kinds)}"
        )
    if scale not in source.tensors:
        raise CheckpointError(f"{file}: tensor {spec.name} is {info.dtype}, but {scale} is missing")
    _check_scale(source, spec, source.tensors[scale])


def _check_scale(source: Source, spec: TensorSpec, info: TensorInfo) -> None:
    file = source.file_of(info.name)
    wanted = scale_shape(spec.shape)
    if info.shape != wanted:
        kinds = {1: "a scale per tensor", spec.shape[0]: "a scale per row"}
        raise CheckpointError(
            f"{file}: tensor {info.name} is {list(info.shape)}; FP8 weights with "
            f"{kinds.get(math.prod(info.shape), 'other scales')} are not supported, only with one "
            f"per 128 x 128 block ({list(wanted)})"
        )
    quantization = source.config.quantization
    is_ue8m0 = quantization is not None and quantization.scale_fmt == "ue8m0"
    # Some writers store E8M0 as U8; like transformers, accept it if the config declares E8M0.
    if info.dtype not in SCALE_DTYPES and not (info.dtype == "U8" and is_ue8m0):
        raise CheckpointError(
            f"{file}: tensor {info.name} is {info.dtype}; scales are read as one of "
            f"{', '.join(SCALE_DTYPES)}"
        )


def _check_shape(source: Source, info: TensorInfo, wanted: tuple[int, ...]) -> None:
    if info.shape == wanted:
        return
    names = next((names for end, names in _FIELDS.items() if info.name.endswith(end)), ())
    reasons = [f"{math.prod(wanted)} values"]
    reasons += [f"{name}={getattr(source.config, name)}" for name in names]
    raise CheckpointError(
        f"{source.file_of(info.name)}: tensor {info.name} is {list(info.shape)}, the config makes "
        f"it {list(wanted)} ({', '.join(reasons)})"
    )
