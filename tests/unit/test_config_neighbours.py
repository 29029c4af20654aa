"""config.json of other publishers' models reads as their presets; the rest is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.config import ModelConfig
from dsv3.config_files import hf_config_dict, load_model_config
from dsv3.config_integers import IntegerConfig, IntegerKind
from dsv3.errors import ConfigError
from tests.checkpoint_files import TINY

# The keys of the published files that the presets do not have.
GLM_52: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "ep_size": 1,
    "head_dim": 192,
    "hidden_act": "silu",
    "index_share_for_mtp_iteration": True,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "indexer_types": ["full"] * 3 + (["shared"] * 3 + ["full"]) * 18 + ["shared"] * 3,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "moe_router_dtype": "float32",
    "num_key_value_heads": 64,
    "pad_token_id": 154820,
    "pretraining_tp": 1,
    "qk_head_dim": 256,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "transformers_version": "5.15.0",
    "use_cache": True,
}
INT4 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"group_size": 32, "num_bits": 4, "strategy": "group", "type": "int"},
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "quant_method": "compressed-tensors",
}


def read(path: Path, data: dict[str, Any], tensors_decide: bool = False) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(data))
    return load_model_config(path, tensors_decide)


def wrapped(text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    """Return the config of Kimi-K2.5 with a text model."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": text["eos_token_id"],
        "ignore_index": -100,
        "media_placeholder_token_id": 163605,
        "model_type": "kimi_k25",
        "pad_token_id": 163839,
        "text_config": text,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "vision_config": {"model_type": "", "patch_size": 14, "vt_hidden_size": 1152},
    } | outer


def test_glm_52(tmp_path: Path) -> None:
    preset = load_model_config("glm-5.2-744b")
    stated = {name: value for name, value in hf_config_dict(preset).items() if value is not None}
    del stated["rope_theta"]
    config = read(tmp_path, stated | GLM_52)
    assert config == preset and not config.warning
    kinds = [config.indexer_kind(layer) for layer in range(79)]
    assert kinds.count("full") == 22 and kinds[6] == kinds[78] == "full" and kinds[77] == "shared"


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_kimi_k25(model_type: str, tmp_path: Path) -> None:
    """Files of transformers give its text model another type; it is the same model."""
    preset = load_model_config("kimi-k2.5-1t")
    text = hf_config_dict(preset) | {"model_type": model_type}
    config = read(tmp_path, wrapped(text, dtype="bfloat16"))
    assert hf_config_dict(config) == text and not config.warning
    assert config.latent_norm_eps == preset.latent_norm_eps == 1e-6


def test_int4_experts_are_read_by_the_config(tmp_path: Path) -> None:
    text = hf_config_dict(TINY) | {"quantization_config": INT4}
    for data in (
        text,
        wrapped(text, quantization_config=INT4),
        wrapped(text),
        wrapped(hf_config_dict(TINY), quantization_config=INT4),
    ):
        config = read(tmp_path, data)
        assert config.integers == IntegerConfig(
            method="compressed-tensors", kinds=(IntegerKind(bits=4, group=32),)
        )
        assert config.quantization is None and not config.warning


@pytest.mark.parametrize(
    ("model_type", "inner"),
    [
        ("glm5_next", None),
        ("glm4_moe", None),
        ("deepseek_v4", None),
        ("kimi_k3", "kimi_linear"),
        ("mistral4", None),
        ("longcat_flash", None),
    ],
)
def test_other_models_are_refused_by_name(
    model_type: str, inner: str | None, tmp_path: Path
) -> None:
    data = hf_config_dict(TINY) | {"model_type": model_type}
    if inner is not None:
        data["text_config"] = hf_config_dict(TINY) | {"model_type": inner}
    with pytest.raises(
        ConfigError, match=f"model_type='{model_type}' .* is not supported"
    ) as error:
        read(tmp_path, data)
    assert "\n" not in str(error.value)
