"""Find, read and write configuration files.

Three formats are supported: Hugging Face's `config.json` (in `dsv3.config_hf`), DeepSeek's
inference JSON, and our YAML. In the last two, an unknown field is an error: all DeepSeek fields
have defaults, so a misspelt one would select another model, and a preset has only the fields of
ModelConfig.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.config import ModelConfig, QuantizationConfig, RopeScaling
from dsv3.config_fields import (
    DEEPSEEK_NAMES,
    DEEPSEEK_ROPE_NAMES,
    check_mapping,
    check_required,
    check_token_ids,
    check_value,
    refuse_unknown,
    shown,
)
from dsv3.config_hf import from_hf
from dsv3.config_quantization import QUANTIZATION_KEYS
from dsv3.errors import ConfigError, shorten
from dsv3.read_files import read_mapping
from dsv3.setting_names import SettingName, flag

_ROOT = Path(__file__).resolve().parents[1]
DEMO = _ROOT / "checkpoints" / "demo-v3"


# A wheel holds the presets inside the package.
_INSTALLED_PRESETS = Path(__file__).parent / "presets"
PRESETS = _INSTALLED_PRESETS if _INSTALLED_PRESETS.is_dir() else _ROOT / "configs"

# Fields of DeepSeek's inference JSON, with their default values.
_DEEPSEEK_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000.0,
}
_DEEPSEEK_ROPE: dict[str, Any] = {
    "original_seq_len": 4096,
    "rope_factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
}
_DEEPSEEK_INDEX = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
_DEEPSEEK_OTHER = ("dtype", "scale_fmt", "max_batch_size", "max_seq_len")
# Fields of ModelConfig that config.json represents differently.
_NOT_OF_HF = ("eos_token_ids", "quantization", "rope_scaling", "warning")


def load_model_config(
    path_or_preset: str | Path, tensors_decide: bool = False, name: SettingName = flag
) -> ModelConfig:
    """Read a model's configuration.

    Args:
        path_or_preset: a checkpoint directory, a Hugging Face config.json, DeepSeek's inference
            JSON, our YAML, or the name of a preset in `configs/`.
        tensors_decide: see `from_hf`.
        name: returns the name of the setting for errors.

    Raises:
        ConfigError: the file does not exist, or a field is missing, wrong or contradictory.
    """
    path = Path(path_or_preset)
    if os.path.isdir(path):  # unlike Path.is_dir, of any name
        return _load_directory(path, tensors_decide, name)
    if os.path.isfile(path):
        return _load_file(path, tensors_decide)
    preset = PRESETS / f"{path_or_preset}.yaml"
    if os.path.isfile(preset):
        return _load_file(preset)
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    given = shorten(str(path_or_preset), 200)
    raise ConfigError(f"{given}: no such file, and no preset of that name ({names})")


def _load_directory(path: Path, tensors_decide: bool, name: SettingName) -> ModelConfig:
    file = path / "config.json"
    if not os.path.lexists(file):
        raise ConfigError(
            f"{path}: no config.json; give the model's configuration with {name('config')}"
        )
    config = _load_file(file, tensors_decide)
    generation = path / "generation_config.json"
    if not os.path.lexists(generation):
        return config
    value = read_mapping(generation).get("eos_token_id")
    generation_ids = check_token_ids(value, f"{generation}: eos_token_id")
    merged = tuple(dict.fromkeys(config.eos_token_ids + generation_ids))
    try:
        return dataclasses.replace(config, eos_token_ids=merged)
    except ConfigError as error:
        raise ConfigError(f"{generation}: {error}") from None


def _load_file(path: Path, tensors_decide: bool = False) -> ModelConfig:
    data = read_mapping(path)
    where = str(path)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(data, where)
    if not data:
        raise ConfigError(f"{where}: has no fields")
    if {"model_type", "architectures", "hidden_size"} & data.keys():
        return from_hf(data, where, tensors_decide)
    return _from_deepseek(data, where)


def _from_yaml(data: dict[str, Any], where: str) -> ModelConfig:
    """Read the fields of ModelConfig under their own names."""
    _check_names(ModelConfig, data, where, but="warning")
    fields = dict(data)
    try:
        for name, kind in (("rope_scaling", RopeScaling), ("quantization", QuantizationConfig)):
            if fields.get(name) is not None:
                given = dict(check_mapping(fields[name], name))
                _check_names(kind, given, name)
                if isinstance(given.get("block"), list):
                    given["block"] = tuple(given["block"])
                fields[name] = kind(**given)
        fields["eos_token_ids"] = check_token_ids(fields.get("eos_token_ids"), "eos_token_ids")
        return ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_names(kind: type, given: Mapping[str, Any], where: str, but: str = "") -> None:
    """Raise ConfigError if a mapping lacks required fields of a dataclass, or has other fields."""
    fields = [f for f in dataclasses.fields(kind) if f.name != but]
    known = [f.name for f in fields]
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    check_required(required, given, [key for key in given if key not in known], where)
    refuse_unknown(given, known, where)


def _from_deepseek(data: dict[str, Any], where: str) -> ModelConfig:
    """Read DeepSeek's own file, which lacks eps, routing method, end tokens and MTP layers."""
    refuse_unknown(
        data, {*_DEEPSEEK_DEFAULTS, *_DEEPSEEK_ROPE, *_DEEPSEEK_INDEX, *_DEEPSEEK_OTHER}, where
    )
    ours = DEEPSEEK_NAMES | DEEPSEEK_ROPE_NAMES
    for key, value in data.items():
        has_no_rank = key == "q_lora_rank" and type(value) is int and value == 0
        if not has_no_rank:
            check_value(ours.get(key, key), value, f"{where}: {key}")
    model = {k: data.get(k, default) for k, default in _DEEPSEEK_DEFAULTS.items()}
    fields = {ours.get(key, key): value for key, value in model.items()}
    index = {key: data[key] for key in _DEEPSEEK_INDEX if key in data}
    if index:
        fields |= _DEEPSEEK_INDEX | index
    sigmoid = fields["scoring_func"] == "sigmoid"
    method = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
    try:
        scaling = _deepseek_rope(data)
        length = int(scaling.original_max_position_embeddings * scaling.factor)
        check_value("max_position_embeddings", length, "original_seq_len x rope_factor")
        fields |= {
            "model_type": "deepseek_v32" if index else "deepseek_v3" if sigmoid else "deepseek_v2",
            "q_lora_rank": fields["q_lora_rank"] or None,
            "norm_topk_prob": sigmoid,
            "topk_method": "noaux_tc" if sigmoid else method,
            "max_position_embeddings": length,
            "rope_scaling": scaling,
            "quantization": _deepseek_quantization(data),
        }
        return ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {_in_deepseek_names(str(error))}") from None


def _in_deepseek_names(text: str) -> str:
    """Return an error's text with DeepSeek's field names."""
    for theirs, ours in DEEPSEEK_NAMES.items():
        text = re.sub(rf"\b{ours}\b", theirs, text)
    return text


def _deepseek_rope(data: Mapping[str, Any]) -> RopeScaling:
    rope = {key: data.get(key, default) for key, default in _DEEPSEEK_ROPE.items()}
    return RopeScaling(
        factor=rope["rope_factor"],
        original_max_position_embeddings=rope["original_seq_len"],
        beta_fast=rope["beta_fast"],
        beta_slow=rope["beta_slow"],
        mscale=rope["mscale"],
        mscale_all_dim=rope["mscale"],
    )


def _deepseek_quantization(data: Mapping[str, Any]) -> QuantizationConfig | None:
    dtype = data.get("dtype", "bf16")
    if dtype not in ("bf16", "fp8"):
        raise ConfigError(f"dtype={shown(dtype)} must be 'bf16' or 'fp8'")
    config = QuantizationConfig(scale_fmt=data.get("scale_fmt"))
    return config if dtype == "fp8" else None


def hf_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` that Hugging Face and this project read back as `config`."""
    data = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key not in _NOT_OF_HF
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
    """Return the `quantization_config` in the format of DeepSeek's published FP8 checkpoints."""
    data: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(quantization.block),
    }
    if quantization.scale_fmt is not None:
        data["scale_fmt"] = quantization.scale_fmt
    return data


def recast_config_dict(
    data: Mapping[str, Any], quantization: QuantizationConfig | None
) -> dict[str, Any]:
    """Return the `config.json` of the same model with weights cast to another type."""
    stale = {*QUANTIZATION_KEYS, "scale_fmt"}
    if data.get("dtype") in ("bf16", "fp8"):  # of DeepSeek's inference fields
        stale.add("dtype")
    recast = {key: value for key, value in data.items() if key not in stale}
    if quantization is not None:
        recast["quantization_config"] = hf_quantization_dict(quantization)
    return recast
