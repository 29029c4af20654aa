"""Read a ModelConfig from Hugging Face's `config.json`.

Several tools write this file, some of them the same value under two names. All names of a value
must agree; a contradictory file is refused, because either value may be the right one. Unknown keys
are reported in one warning, since files of newer versions have more keys.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.config import MODEL_TYPES, ModelConfig, QuantizationConfig, check_family
from dsv3.config_fields import (
    DEEPSEEK_NAMES,
    DEEPSEEK_ROPE_NAMES,
    agreed,
    check_only,
    check_required,
    check_token_ids,
    check_value,
    listed,
    shown,
)
from dsv3.config_indexer import INDEXER_KEYS, read_indexer_types
from dsv3.config_quantization import read_quantization
from dsv3.config_rope import read_rope
from dsv3.errors import ConfigError

Names = Mapping[str, Any]

# Fields that are read by separate functions.
_READ_APART = {
    *("eos_token_ids", "indexer_types", "quantization", "integers"),
    *("rope_scaling", "rope_theta", "torch_dtype"),
}
_FIELDS = [
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in _READ_APART and f.name != "warning"
]
_REQUIRED = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
# Names of transformers' attribute maps, and of inference JSON merged into the file.
_OTHER_NAMES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "norm_eps": "rms_norm_eps",
} | DEEPSEEK_NAMES
# The text part of a multi-modal model's file, and fields that may be in either part.
_TEXT = "text_config"
_OF_BOTH_PARTS = ("bos_token_id", "eos_token_id", "quantization_config", "tie_word_embeddings")
# Keys that would change what the model computes, with the only value that is supported.
_ONLY: Names = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_router_dtype": "float32",
    "n_hash_layers": 0,
    "sliding_window": None,
    "swiglu_limit": None,
    "zero_expert_num": 0,
}
# Keys read below: derived values and other spellings.
_READ = set(
    """
    compression_config dtype eos_token_id head_dim layer_types mlp_layer_types
    num_key_value_heads original_max_position_embeddings partial_rotary_factor qk_head_dim
    quantization quantization_config rope_parameters rope_scaling rope_theta scale_fmt torch_dtype
    """.split()  # noqa: SIM905
)
# Keys of training, bookkeeping and generation defaults, which do not affect the computation.
_IGNORED = set(
    """
    add_cross_attention architectures attention_dropout auto_map aux_loss_alpha bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    ep_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder label2id
    length_penalty max_batch_size max_length max_seq_len min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version
    typical_p unsloth_fixed use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
_KNOWN = {
    *(*_FIELDS, *_OTHER_NAMES, *_ONLY, *_READ, *_IGNORED),
    *(*DEEPSEEK_ROPE_NAMES, *INDEXER_KEYS),
}
_GLM = ("glm_moe_dsa", "glm4_moe_lite")
# Kinds of attention in transformers' `layer_types`, with the older name of V3.2's.
_DENSE_LAYERS = ("full_attention",)
_SPARSE_LAYERS = ("indexed_attention", "deepseek_sparse_attention")


def text_part(data: Names, where: str) -> Names:
    """Return the fields of the text model in a multi-modal model's file; other files unchanged.

    Raises:
        ConfigError: both parts of the file have a field, with different values.
    """
    inner = data.get(_TEXT)
    if data.get("model_type") in MODEL_TYPES or not isinstance(inner, dict):
        return data
    if inner.get("model_type") not in MODEL_TYPES:
        return data
    shared = {
        name: agreed([(name, data.get(name)), (f"{_TEXT}.{name}", inner.get(name))], where)
        for name in _OF_BOTH_PARTS
        if name in data or name in inner
    }
    return {**inner, **shared}


def from_hf(data: Names, where: str, tensors_decide: bool = False) -> ModelConfig:
    """Return the model of a `config.json`.

    Args:
        data: contents of the file.
        where: its path.
        tensors_decide: ignore unsupported quantization with a warning; the caller checks the stored
            tensors, which may not be quantized.

    Raises:
        ConfigError: the model is of another family, or the file is contradictory or has an
            unsupported value.
    """
    data = text_part(data, where)
    names = data.get("architectures")
    architecture = shown(names[0]).strip("'") if names and isinstance(names, list) else "unknown"
    check_family(data.get("model_type"), f"{where}: ", f" ({architecture})")
    check_only(data, _ONLY, f"{where}: ")
    rope = read_rope(data, where)
    quantization = read_quantization(data, where, tensors_decide)
    fields = _plain_fields(data, where) | {
        "torch_dtype": _dtype(data, quantization.config, where),
        "eos_token_ids": check_token_ids(data.get("eos_token_id"), f"{where}: eos_token_id"),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "quantization": quantization.config,
        "integers": quantization.integers,
    }
    if "first_k_dense_replace" not in fields and isinstance(data.get("mlp_layer_types"), list):
        fields["first_k_dense_replace"] = data["mlp_layer_types"].count("dense")
    num_layers = fields.get("num_hidden_layers")
    fields["indexer_types"] = read_indexer_types(data, num_layers, where)
    unknown = [key for key in data if key not in _KNOWN and not key.startswith("_")]
    check_required([*_REQUIRED, "n_group", "topk_group"], fields, unknown, where)
    unknown += [*rope.unknown, *quantization.unknown]
    warnings = [quantization.warning] if quantization.warning else []
    if unknown:
        warnings.append(f"keys without a meaning here are ignored: {listed(unknown)}")
    if warnings:
        # Without the directory, which may differ on other hosts.
        fields["warning"] = f"{Path(where).name}: {'; '.join(warnings)}"
    try:
        config = ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {_in_names_of_file(str(error), data)}") from None
    _check_derived(data, config, where)
    _check_layer_types(data, config, where)
    return config


def _in_names_of_file(text: str, data: Names) -> str:
    """Return the text of an error with the names that the file uses for fields."""
    for name, field in _OTHER_NAMES.items():
        if name in data and field not in data:
            text = re.sub(rf"\b{field}\b", name, text)
    return text


def _plain_fields(data: Names, where: str) -> dict[str, Any]:
    """Return the fields of ModelConfig that are single values in the file."""
    fields: dict[str, Any] = {}
    for field in _FIELDS:
        aliases = [name for name, hf_name in _OTHER_NAMES.items() if hf_name == field]
        given = [(name, data[name]) for name in (field, *aliases) if name in data]
        for name, value in given:
            if value is not None:
                check_value(field, value, f"{where}: {name}")
        if given:
            fields[field] = agreed(given, where)
    for name, default in _defaults(data).items():
        if fields.get(name) is None:
            fields[name] = default
    return fields


def _defaults(data: Names) -> dict[str, Any]:
    """Return default values of fields that are null or that some writers omit.

    null means "no groups". Without the keys, V2 and GLM have no groups either; for V3, the
    published code and transformers then use 8 and 4, so a file without them is ambiguous and gets
    no default. GLM-5's indexer is interleaved in transformers whatever the file says.
    """
    kind = data["model_type"]
    v2 = kind == "deepseek_v2"
    never_grouped = v2 or kind in _GLM
    groups = [name for name in ("n_group", "topk_group") if never_grouped or name in data]
    return dict.fromkeys(groups, 1) | {
        "scoring_func": "softmax" if v2 else "sigmoid",
        "topk_method": "greedy" if v2 else "noaux_tc",
        "num_nextn_predict_layers": 0,
        "n_shared_experts": 0,
        "indexer_rope_interleave": kind == "glm_moe_dsa",
        "index_share_for_mtp_iteration": False,
    }


def _dtype(data: Names, quantization: QuantizationConfig | None, where: str) -> Any:
    """Return the dtype of weights that are not quantized; the default is bfloat16.

    In a file with DeepSeek's inference fields, `dtype` is one of them: fp8 or bf16 weights.
    """
    torch_dtype = _plain_dtype(data.get("torch_dtype"))
    dtype = _plain_dtype(data.get("dtype"))
    stored = "bf16" if quantization is None else "fp8"
    if dtype in ("bf16", "fp8"):
        if dtype != stored:
            raise ConfigError(
                f"{where}: dtype={dtype!r}, but weights are {stored} by quantization_config="
                f"{shown(data.get('quantization_config'))}; correct or remove one of them"
            )
        dtype = None
    dtype = agreed([("torch_dtype", torch_dtype), ("dtype", dtype)], where)
    return "bfloat16" if dtype is None else dtype


def _plain_dtype(dtype: Any) -> Any:
    """Return a dtype without torch's prefix; None for FP8, which is not used for all weights."""
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    return None if name == "float8_e4m3fn" else name


def _check_derived(data: Names, config: ModelConfig, where: str) -> None:
    """Raise ConfigError for stale derived values; head_dim has several meanings in use."""
    heads = "num_attention_heads"
    nope = "qk_nope_head_dim"
    rope = "qk_rope_head_dim"
    query = (f"{nope} + {rope}", config.qk_head_dim)
    average = (f"hidden_size / {heads}", config.hidden_size // config.num_attention_heads)
    nope_dim = (nope, config.qk_nope_head_dim)
    value_dim = ("v_head_dim", config.v_head_dim)
    for name, meanings in (
        ("num_key_value_heads", [(heads, config.num_attention_heads)]),
        ("qk_head_dim", [query]),
        ("head_dim", [(rope, config.qk_rope_head_dim), nope_dim, query, value_dim, average]),
    ):
        value = data.get(name)
        fits = type(value) is int and value in [size for _, size in meanings]
        if value is not None and not fits:
            wanted = " or ".join(f"{meaning}={size}" for meaning, size in meanings)
            raise ConfigError(f"{where}: {name}={shown(value)} must be {wanted}")


def _check_layer_types(data: Names, config: ModelConfig, where: str) -> None:
    """Raise ConfigError if per-layer lists of transformers 5 contradict the other fields."""
    layers = config.num_hidden_layers
    kinds = _SPARSE_LAYERS if config.has_indexer else _DENSE_LAYERS
    attention = data.get("layer_types")
    mlp = data.get("mlp_layer_types")
    if attention is not None and attention not in [[kind] * layers for kind in kinds]:
        raise ConfigError(
            f"{where}: layer_types={shown(attention)} must be {layers} x {kinds[0]!r}, as "
            f"num_hidden_layers={layers} and model_type={config.model_type!r} say"
        )
    is_moe = [config.is_moe_layer(layer) for layer in range(layers)]
    if mlp is not None and mlp != ["sparse" if moe else "dense" for moe in is_moe]:
        dense = is_moe.count(False)
        raise ConfigError(
            f"{where}: mlp_layer_types={shown(mlp)} must be {dense} x 'dense', then "
            f"{layers - dense} x 'sparse', as first_k_dense_replace="
            f"{config.first_k_dense_replace} and num_hidden_layers={layers} say"
        )
