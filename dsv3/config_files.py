"""Read a ModelConfig: Hugging Face `config.json`, DeepSeek's inference JSON, our YAML, a preset.

Published configs carry many keys that say nothing about the computation; those are listed here.
Any other unknown key is an error, because it may change what the model computes.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.config import ModelConfig, QuantizationConfig, RopeScaling, check_family, refuse_unknown
from dsv3.errors import ConfigError
from dsv3.read_files import read_mapping

_ROOT = Path(__file__).resolve().parents[1]
PRESETS = _ROOT / "configs"
DEMO = _ROOT / "checkpoints" / "demo-v3"

_HF_FIELDS = {f.name for f in dataclasses.fields(ModelConfig)} - {"eos_token_ids", "quantization"}
# Read below, though not a field of the same name.
_HF_READ = set(
    """
    attention_bias dtype eos_token_id hidden_act layer_types mlp_bias mlp_layer_types
    num_key_value_heads quantization_config rope_parameters
    """.split()  # noqa: SIM905
)
# Training, bookkeeping, generation defaults and derived values.
_HF_IGNORED = set(
    """
    add_cross_attention architectures attention_dropout auto_map aux_loss_alpha bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    ep_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id head_dim id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads qk_head_dim
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version
    typical_p unsloth_fixed use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
_ROPE_IGNORED = {"rope_theta", "rope_type", "type", "attention_factor"}

# Fields of DeepSeek's inference JSON: our name, and the value where the file leaves it out.
_DEEPSEEK_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 102400),
    "dim": ("hidden_size", 2048),
    "inter_dim": ("intermediate_size", 10944),
    "moe_inter_dim": ("moe_intermediate_size", 1408),
    "n_layers": ("num_hidden_layers", 27),
    "n_dense_layers": ("first_k_dense_replace", 1),
    "n_heads": ("num_attention_heads", 16),
    "n_routed_experts": ("n_routed_experts", 64),
    "n_shared_experts": ("n_shared_experts", 2),
    "n_activated_experts": ("num_experts_per_tok", 6),
    "n_expert_groups": ("n_group", 1),
    "n_limited_groups": ("topk_group", 1),
    "score_func": ("scoring_func", "softmax"),
    "route_scale": ("routed_scaling_factor", 1.0),
    "q_lora_rank": ("q_lora_rank", 0),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
    "rope_theta": ("rope_theta", 10000.0),
}
_DEEPSEEK_ROPE = {
    "original_seq_len": 4096,
    "rope_factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
}
_DEEPSEEK_INDEX = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
_DEEPSEEK_OTHER = ("dtype", "scale_fmt", "max_batch_size", "max_seq_len")


def load_model_config(path_or_preset: str | Path) -> ModelConfig:
    """Read a model's configuration.

    Args:
        path_or_preset: a checkpoint directory, a Hugging Face config.json, DeepSeek's inference
            JSON, our YAML, or the name of a preset in `configs/`.

    Raises:
        ConfigError: nothing is there, or a field is unknown, missing or contradictory.
    """
    path = Path(path_or_preset)
    if os.path.isdir(path):  # unlike Path.is_dir, of any name
        return _load_directory(path)
    if os.path.isfile(path):
        return _load_file(path)
    preset = PRESETS / f"{path_or_preset}.yaml"
    if os.path.isfile(preset):
        return _load_file(preset)
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(f"{path_or_preset}: no such file, and no preset of that name ({names})")


def _load_directory(path: Path) -> ModelConfig:
    file = path / "config.json"
    if not os.path.lexists(file):
        raise ConfigError(f"{path}: no config.json; give the model's configuration with --config")
    config = _load_file(file)
    generation = path / "generation_config.json"
    if not os.path.lexists(generation):
        return config
    more = _token_ids(read_mapping(generation).get("eos_token_id"), str(generation))
    merged = tuple(dict.fromkeys(config.eos_token_ids + more))
    return dataclasses.replace(config, eos_token_ids=merged)


def _load_file(path: Path) -> ModelConfig:
    data = read_mapping(path)
    where = str(path)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(data, where)
    if "model_type" in data or "architectures" in data:
        return _from_hf(data, where)
    return _from_deepseek(data, where)


def _build(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """Make the config; say where a missing or wrong field was."""
    required = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise ConfigError(f"{where}: missing field {missing[0]!r}")
    try:
        return ModelConfig(**fields)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ConfigError(f"{where}: eos_token_id={value!r} must be an integer or a list of them")
    return tuple(ids)


def _from_yaml(data: dict[str, Any], where: str) -> ModelConfig:
    fields = dict(data)
    refuse_unknown(fields, (f.name for f in dataclasses.fields(ModelConfig)), where)
    rope, quantization = fields.get("rope_scaling"), fields.get("quantization")
    if rope is not None:
        fields["rope_scaling"] = _rope_scaling(rope, f"{where}: rope_scaling")
    if quantization is not None:
        refuse_unknown(quantization, ("block", "scale_fmt"), f"{where}: quantization")
        block = {"block": tuple(quantization.get("block", (128, 128)))}
        fields["quantization"] = QuantizationConfig(**quantization | block)
    fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
    return _build(fields, where)


def _rope_scaling(data: Mapping[str, Any], where: str) -> RopeScaling:
    names = [f.name for f in dataclasses.fields(RopeScaling)]
    refuse_unknown(data, [*names, *_ROPE_IGNORED], where)
    for name in ("factor", "original_max_position_embeddings"):
        if name not in data:
            raise ConfigError(f"{where}: missing field {name!r}")
    try:
        values = {name: float(data[name]) for name in names if name in data}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    original = int(values.pop("original_max_position_embeddings"))
    return RopeScaling(**values, original_max_position_embeddings=original)


def _from_hf(data: dict[str, Any], where: str) -> ModelConfig:
    names = data.get("architectures")
    architecture = names[0] if names and isinstance(names, list) else "unknown"
    check_family(data.get("model_type"), f"{where}: ", f" ({architecture})")
    known = _HF_FIELDS | _HF_READ | _HF_IGNORED
    refuse_unknown((key for key in data if not key.startswith("_")), known, where)
    _check_plain(data, where)
    model_type = data["model_type"]
    v2 = model_type == "deepseek_v2"
    fields = {name: data[name] for name in _HF_FIELDS & data.keys()}
    # null means "no groups", and transformers leaves the routing method of V3 out.
    for name, default in (
        ("n_group", 1),
        ("topk_group", 1),
        ("scoring_func", "softmax" if v2 else "sigmoid"),
        ("topk_method", "greedy" if v2 else "noaux_tc"),
        ("num_nextn_predict_layers", 0),
        ("n_shared_experts", 0),
    ):
        if fields.get(name) is None:
            fields[name] = default
    fields["torch_dtype"] = data.get("torch_dtype") or data.get("dtype") or "bfloat16"
    fields["eos_token_ids"] = _token_ids(data.get("eos_token_id"), where)
    fields |= _hf_rope(data, where)
    fields["quantization"] = _hf_quantization(data.get("quantization_config"), where)
    _hf_layer_types(data, fields, where)
    return _build(fields, where)


def _check_plain(data: Mapping[str, Any], where: str) -> None:
    """Refuse settings that no model of the family uses."""
    heads = data.get("num_attention_heads")
    for name, wanted in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("num_key_value_heads", heads),
    ):
        value = data.get(name)
        if value is not None and value != wanted:
            raise ConfigError(f"{where}: {name}={value!r} is not supported; it must be {wanted!r}")


def _hf_rope(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    where = f"{where}: rope_scaling"
    theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; only 'yarn' is")
    rope = {key: value for key, value in rope.items() if value is not None}
    scaling = _rope_scaling(rope, where)
    if "attention_factor" in rope:
        raise ConfigError(f"{where}: attention_factor is not supported; use mscale")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _hf_quantization(data: Mapping[str, Any] | None, where: str) -> QuantizationConfig | None:
    if data is None:
        return None
    where = f"{where}: quantization_config"
    method = data.get("quant_method")
    if method != "fp8":
        raise ConfigError(
            f"{where}: quant_method={method!r} is not supported; only block-scaled fp8 is "
            "(no int4 or other packed weights)"
        )
    only = {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}
    for name, wanted in only.items():
        if data.get(name) not in (None, wanted):
            raise ConfigError(f"{where}: {name}={data[name]!r} is not supported; only {wanted!r}")
    block, scale_fmt = data.get("weight_block_size"), data.get("scale_fmt")
    if block != [128, 128]:
        raise ConfigError(f"{where}: weight_block_size={block!r} must be [128, 128]")
    try:
        return QuantizationConfig(scale_fmt=None if scale_fmt == "float" else scale_fmt)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _hf_layer_types(data: Mapping[str, Any], fields: dict[str, Any], where: str) -> None:
    """Hold transformers 5's per-layer lists to the uniform layout they must describe."""
    mlp = data.get("mlp_layer_types")
    if mlp is not None:
        dense = fields.setdefault("first_k_dense_replace", mlp.count("dense"))
        layers = data.get("num_hidden_layers", len(mlp))
        if mlp != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise ConfigError(
                f"{where}: mlp_layer_types must be first_k_dense_replace={dense} dense layers, "
                "then sparse ones"
            )
    if len(set(data.get("layer_types") or ())) > 1:
        raise ConfigError(f"{where}: layer_types must be the same for every layer")


def _from_deepseek(data: dict[str, Any], where: str) -> ModelConfig:
    """DeepSeek's own file: it has no field for eps, routing method, end tokens or MTP layers."""
    known = [*_DEEPSEEK_FIELDS, *_DEEPSEEK_ROPE, *_DEEPSEEK_INDEX, *_DEEPSEEK_OTHER]
    refuse_unknown(data, known, where)
    fields = {ours: data.get(key, value) for key, (ours, value) in _DEEPSEEK_FIELDS.items()}
    rope = _DEEPSEEK_ROPE | {key: data[key] for key in _DEEPSEEK_ROPE if key in data}
    index = {key: data[key] for key in _DEEPSEEK_INDEX if key in data}
    sigmoid = fields["scoring_func"] == "sigmoid"
    dtype = data.get("dtype", "bf16")
    if dtype not in ("bf16", "fp8"):
        raise ConfigError(f"{where}: dtype={dtype!r} must be 'bf16' or 'fp8'")
    method = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
    if index:
        fields |= _DEEPSEEK_INDEX | index
    if dtype == "fp8":
        fields["quantization"] = QuantizationConfig(scale_fmt=data.get("scale_fmt"))
    factor, original = rope.pop("rope_factor"), rope.pop("original_seq_len")
    scaling = {"factor": factor, "original_max_position_embeddings": original, **rope}
    scaling["mscale_all_dim"] = rope["mscale"]
    fields |= {
        "model_type": "deepseek_v32" if index else "deepseek_v3" if sigmoid else "deepseek_v2",
        "q_lora_rank": fields["q_lora_rank"] or None,
        "norm_topk_prob": sigmoid,
        "topk_method": "noaux_tc" if sigmoid else method,
        "max_position_embeddings": int(original * factor),
        "rope_scaling": _rope_scaling(scaling, where),
    }
    return _build(fields, where)


def hf_config_dict(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that Hugging Face and this project read back as `config`."""
    data = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key not in ("eos_token_ids", "quantization", "rope_scaling")
    }
    version = {"deepseek_v2": "V2", "deepseek_v32": "V32"}.get(config.model_type, "V3")
    data["architectures"] = [f"Deepseek{version}ForCausalLM"]
    data |= {"hidden_act": "silu", "attention_bias": False, "q_lora_rank": config.q_lora_rank}
    data["num_key_value_heads"] = config.num_attention_heads
    rope = config.rope_scaling
    data["rope_scaling"] = rope and {"type": "yarn", **dataclasses.asdict(rope)}
    if config.eos_token_ids:
        ids = list(config.eos_token_ids)
        data["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    if config.quantization is not None:
        data["quantization_config"] = hf_quantization_dict(config.quantization)
    return dict(sorted(data.items()))


def hf_quantization_dict(quantization: QuantizationConfig) -> dict[str, Any]:
    """The `quantization_config` of DeepSeek's published FP8 checkpoints."""
    data: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(quantization.block),
    }
    if quantization.scale_fmt is not None:
        data["scale_fmt"] = quantization.scale_fmt
    return data
