"""Find, read and write configuration files.

`dsv3.config_hf` reads the keys of Hugging Face's `config.json`, as JSON or as YAML (the presets).
DeepSeek's inference JSON is completed to such a file first. All its fields have defaults, so an
unknown field in it is an error: a misspelt one would select another model.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.config_fields import (
    DEEPSEEK_NAMES,
    DEEPSEEK_ROPE_NAMES,
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
# Model classes of model types; the others have V3's.
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}
# Fields of ModelConfig that config.json represents differently.
_NOT_OF_HF = ("eos_token_ids", "integers", "quantization", "rope_scaling", "warning")


def load_model_config(
    path_or_preset: str | Path, tensors_decide: bool = False, name: SettingName = flag
) -> ModelConfig:
    """Read a model's configuration.

    Args:
        path_or_preset: a checkpoint directory, a Hugging Face config.json (or its keys in YAML),
            DeepSeek's inference JSON, or the name of a preset in `configs/`.
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
    where = str(path)
    data = read_mapping(path)
    if not data:
        raise ConfigError(f"{where}: has no fields")
    if not {"model_type", "architectures", "hidden_size"} & data.keys():
        data = _hf_of_deepseek(data, where)
    return from_hf(data, where, tensors_decide)


def _hf_of_deepseek(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return DeepSeek's own file with the fields it lacks: family, routing method, YaRN.

    `from_hf` reads the other fields under DeepSeek's names.
    """
    _check_deepseek(data, where)
    hf = _DEEPSEEK_DEFAULTS | {key: data[key] for key in data if key not in _DEEPSEEK_ROPE}
    has_indexer = not _DEEPSEEK_INDEX.keys().isdisjoint(data)
    if has_indexer:
        hf = _DEEPSEEK_INDEX | hf
    if data.get("dtype") == "fp8":
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        hf["quantization_config"] = quantization | {"scale_fmt": data.get("scale_fmt")}
    is_sigmoid = hf["score_func"] == "sigmoid"
    dense = "deepseek_v3" if is_sigmoid else "deepseek_v2"
    method = "group_limited_greedy" if hf["n_expert_groups"] > 1 else "greedy"
    return (
        hf
        | _deepseek_rope(data, where)
        | {
            "model_type": "deepseek_v32" if has_indexer else dense,
            "q_lora_rank": hf["q_lora_rank"] or None,
            "norm_topk_prob": is_sigmoid,
            "topk_method": "noaux_tc" if is_sigmoid else method,
        }
    )


def _check_deepseek(data: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an unknown field or an impossible value."""
    refuse_unknown(
        data, {*_DEEPSEEK_DEFAULTS, *_DEEPSEEK_ROPE, *_DEEPSEEK_INDEX, *_DEEPSEEK_OTHER}, where
    )
    ours = DEEPSEEK_NAMES | DEEPSEEK_ROPE_NAMES
    for key, value in data.items():
        has_no_rank = key == "q_lora_rank" and type(value) is int and value == 0
        if not has_no_rank:
            check_value(ours.get(key, key), value, f"{where}: {key}")
    if data.get("dtype", "bf16") not in ("bf16", "fp8"):
        raise ConfigError(f"{where}: dtype={shown(data['dtype'])} must be 'bf16' or 'fp8'")
    # null would be the family's default, and the family is chosen by this very field.
    if data.get("score_func", "softmax") not in ("softmax", "sigmoid"):
        given = shown(data["score_func"])
        raise ConfigError(f"{where}: score_func={given} must be 'softmax' or 'sigmoid'")


def _deepseek_rope(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return YaRN and the longest context, in Hugging Face's fields."""
    rope = {key: data.get(key, default) for key, default in _DEEPSEEK_ROPE.items()}
    length = int(rope["original_seq_len"] * rope["rope_factor"])
    check_value("max_position_embeddings", length, f"{where}: original_seq_len x rope_factor")
    scaling = {ours: rope[theirs] for theirs, ours in DEEPSEEK_ROPE_NAMES.items()}
    # DeepSeek's code uses its one mscale for both, so cosines and sines are not scaled.
    scaling |= {"type": "yarn", "mscale": rope["mscale"], "attention_factor": 1.0}
    return {"max_position_embeddings": length, "rope_scaling": scaling}


def hf_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` that Hugging Face and this project read back as `config`."""
    data = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key not in _NOT_OF_HF
    }
    if not config.has_indexer:
        del data["indexer_rope_interleave"]
        del data["index_share_for_mtp_iteration"]
    architecture = _ARCHITECTURES.get(config.model_type, "DeepseekV3ForCausalLM")
    data["architectures"] = [architecture]
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
    data: Mapping[str, Any],
    quantization: QuantizationConfig | None,
    integers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the `config.json` of the same model with weights cast to another type.

    Args:
        data: the file's contents.
        quantization: of FP8 weights.
        integers: the `quantization_config` of a model with integers, instead of one of FP8.
    """
    stale = {*QUANTIZATION_KEYS, "scale_fmt"}
    if data.get("dtype") in ("bf16", "fp8"):  # of DeepSeek's inference fields
        stale.add("dtype")
    recast = {key: value for key, value in data.items() if key not in stale}
    if integers is not None:
        recast["quantization_config"] = dict(integers)
    elif quantization is not None:
        recast["quantization_config"] = hf_quantization_dict(quantization)
    return recast
