"""Every spelling of a configuration reads as the same model; every surprise is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.config import ModelConfig
from dsv3.config_files import PRESETS, hf_config_dict, load_model_config
from dsv3.errors import ConfigError
from tests.checkpoint_files import FP8, TINY

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
DEEPSEEK_671B = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}
DEEPSEEK_16B = {"dim": 2048, "mscale": 0.707, "n_heads": 16, "q_lora_rank": 0}
UNTOLD = ("bos_token_id", "eos_token_ids", "num_nextn_predict_layers")


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def same_but_untold(a: ModelConfig, b: ModelConfig) -> bool:
    told = {f.name for f in dataclasses.fields(ModelConfig)} - set(UNTOLD)
    return all(getattr(a, name) == getattr(b, name) for name in told)


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_presets_survive_hugging_face(preset: str, tmp_path: Path) -> None:
    config = load_model_config(preset)
    assert load_model_config(write(tmp_path / "config.json", hf_config_dict(config))) == config


def test_deepseek_files_are_the_presets(tmp_path: Path) -> None:
    v3 = load_model_config(write(tmp_path / "671b.json", DEEPSEEK_671B))
    assert same_but_untold(v3, load_model_config("v3-671b"))
    sparse = DEEPSEEK_671B | {"scale_fmt": "ue8m0", "index_topk": 2048}
    v32 = load_model_config(write(tmp_path / "v32.json", sparse))
    assert same_but_untold(v32, load_model_config("v3.2-671b"))
    lite = load_model_config(write(tmp_path / "16b.json", DEEPSEEK_16B))
    assert same_but_untold(lite, load_model_config("v2-lite-16b"))


def test_demo_directory() -> None:
    config = load_model_config(DEMO)
    assert config.quantization is not None
    assert config.num_nextn_predict_layers == 1
    assert config.eos_token_ids == (1,)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    write(tmp_path / "config.json", hf_config_dict(TINY))
    write(tmp_path / "generation_config.json", {"eos_token_id": [7, 1]})
    assert load_model_config(tmp_path).eos_token_ids == (1, 7)


@pytest.mark.parametrize("name", ["DeepseekV2Config", "DeepseekV3Config", "DeepseekV32Config"])
@pytest.mark.parametrize("yarn", [False, True])
def test_configs_saved_by_transformers(name: str, yarn: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    rope = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope |= {"rope_theta": 5e4, "original_max_position_embeddings": 4096}
    more = {"rope_parameters": rope} if yarn else {}
    saved = getattr(transformers, name)(num_experts_per_tok=6, num_hidden_layers=5, **more)
    saved.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.num_experts_per_tok == 6
    assert config.num_hidden_layers == 5
    assert (config.rope_scaling is not None) == yarn
    assert config.rope_theta == (5e4 if yarn else 1e4)
    assert config.has_indexer == (name == "DeepseekV32Config")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_expert_per_tok": 8}, "unknown field 'num_expert_per_tok'; did you mean"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"model_type": "qwen2", "architectures": 7}, "unknown"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "missing field 'original_max"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "int4"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "128, 128"),
        ({"n_group": 3}, "n_group=3 does not divide"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
        ({"eos_token_id": "end"}, "eos_token_id='end'"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types"),
    ],
)
def test_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", hf_config_dict(TINY) | change)
    with pytest.raises(ConfigError, match=words) as caught:
        load_model_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'n_heds'; did you mean 'n_heads'"):
        load_model_config(write(tmp_path / "config.json", DEEPSEEK_671B | {"n_heds": 1}))
    (tmp_path / "ours.yaml").write_text("model_type: deepseek_v3\n")
    with pytest.raises(ConfigError, match="missing field 'vocab_size'"):
        load_model_config(tmp_path / "ours.yaml")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model_config(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match=r"no preset of that name \(.*v3-671b"):
        load_model_config("v4-1t")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model_config(tmp_path / "..")


def test_fp8_survives_hugging_face(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, quantization=dataclasses.replace(FP8, scale_fmt="ue8m0"))
    assert load_model_config(write(tmp_path / "config.json", hf_config_dict(config))) == config
