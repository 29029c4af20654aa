"""Files of every kind read as the same model; wrong ones are refused by file and field."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.config import ModelConfig
from dsv3.config_files import PRESETS, hf_config_dict, load_model_config, recast_config_dict
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
UNSTATED = ("bos_token_id", "eos_token_ids", "num_nextn_predict_layers")


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def same_stated_fields(a: ModelConfig, b: ModelConfig) -> bool:
    stated = {f.name for f in dataclasses.fields(ModelConfig)} - set(UNSTATED)
    return all(getattr(a, name) == getattr(b, name) for name in stated)


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_presets_survive_hugging_face(preset: str, tmp_path: Path) -> None:
    config = load_model_config(preset)
    assert load_model_config(write(tmp_path / "config.json", hf_config_dict(config))) == config


def test_deepseek_files_are_the_presets(tmp_path: Path) -> None:
    v3 = load_model_config(write(tmp_path / "671b.json", DEEPSEEK_671B))
    assert same_stated_fields(v3, load_model_config("v3-671b"))
    sparse = DEEPSEEK_671B | {"scale_fmt": "ue8m0", "index_topk": 2048}
    v32 = load_model_config(write(tmp_path / "v32.json", sparse))
    assert same_stated_fields(v32, load_model_config("v3.2-671b"))
    lite = load_model_config(write(tmp_path / "16b.json", DEEPSEEK_16B))
    assert same_stated_fields(lite, load_model_config("v2-lite-16b"))


def test_demo_directory() -> None:
    config = load_model_config(DEMO)
    assert config.quantization is not None
    assert config.num_nextn_predict_layers == 1
    assert config.eos_token_ids == (1,)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    write(tmp_path / "config.json", hf_config_dict(TINY))
    write(tmp_path / "generation_config.json", {"eos_token_id": [7, 1]})
    assert load_model_config(tmp_path).eos_token_ids == (1, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 7168.0}, r": dim=7168\.0 must be a positive integer"),
        ({"n_layers": True}, ": n_layers=True must be"),
        ({"n_limited_groups": 9}, ": n_limited_groups=9 is more than n_expert_groups=8"),
        ({"n_activated_experts": 300}, ": n_activated_experts=300 is more than the 128 experts"),
        ({"score_func": ["sigmoid"]}, r"score_func=\['sigmoid'\]"),
        ({"score_func": None}, ": score_func=None must be 'softmax' or 'sigmoid'"),
        ({"rope_factor": "40"}, ": rope_factor='40' must be"),
        ({"rope_factor": 1e9}, ": original_seq_len x rope_factor=.* must be"),
        ({"beta_slow": 0}, ": beta_slow=0 must be"),
        ({"beta_fast": 0.5}, r"beta_fast=0\.5 must be at least beta_slow"),
        ({"mscale": -1}, ": mscale=-1 must be"),
        ({"index_topk": 0}, ": index_topk=0 must be"),
        ({"dtype": 3}, ": dtype=3 must be"),
        ({"scale_fmt": "e8m0"}, ": scale_fmt='e8m0' must be"),
        ({"n_heds": 1, "n_lay": 2}, ": unknown fields 'n_heds', 'n_lay'$"),
    ],
)
def test_deepseek_files_are_checked(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", DEEPSEEK_671B | change)
    with pytest.raises(ConfigError, match=words) as caught:
        load_model_config(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hidden_size: 7168.0", r": hidden_size=7168\.0 must be a positive integer"),
        ("rope_theta: 1e4", ": rope_theta='1e4' must be a number"),  # YAML's floats have a dot
        ("rms_norm_eps: .nan", ": rms_norm_eps=nan must be"),
        ("rope_scaling: yarn", ": rope_scaling='yarn' must be a mapping"),
        ("rope_scaling: {factor: 4.0}", ": rope_scaling has no rope_type; add rope_type='yarn'"),
        (
            "rope_scaling: {factor: 4.0, type: yarn}",
            ": rope_scaling: missing field 'original_max_position",
        ),
        (
            "rope_scaling: {factor: 4.0, original_max_position_embeddings: 64, type: linear}",
            ": rope_scaling: rope type 'linear' is not supported",
        ),
        ("quantization_config: fp8", ": quantization_config='fp8' must be a mapping"),
        (
            "quantization_config: {quant_method: fp8, weight_block_size: 128}",
            r": quantization_config\.weight_block_size=128 must be",
        ),
        ("eos_token_id: end", ": eos_token_id='end' must be an integer"),
        ("1: 2", ": not a mapping of field names to values$"),
    ],
)
def test_yaml_files_are_checked(line: str, words: str, tmp_path: Path) -> None:
    field = line.partition(":")[0]
    preset = yaml.safe_load((PRESETS / "v3-671b.yaml").read_text())
    kept = {name: value for name, value in preset.items() if name != field}
    file = tmp_path / "ours.yaml"
    file.write_text(f"{yaml.safe_dump(kept)}{line}\n")
    with pytest.raises(ConfigError, match=words) as caught:
        load_model_config(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_unknown_keys_in_yaml_are_reported_as_in_json(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(f"{(PRESETS / 'v3-671b.yaml').read_text()}\nwarning: none\nscales: x\n")
    config = load_model_config(file)
    assert config == load_model_config("v3-671b")
    words = "ours.yaml: keys without a meaning here are ignored: 'warning', 'scales'"
    assert config.warning == words


def test_a_hint_names_a_required_field_that_is_absent(tmp_path: Path) -> None:
    preset = (PRESETS / "v3-671b.yaml").read_text()
    file = tmp_path / "ours.yaml"
    file.write_text(preset.replace("num_experts_per_tok:", "num_expert_per_tok:"))
    words = "missing field 'num_experts_per_tok'; did you mean it by 'num_expert_per_tok'?"
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_model_config(file)


def test_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("model_type: deepseek_v3\n")
    with pytest.raises(ConfigError, match="missing field 'vocab_size'"):
        load_model_config(tmp_path / "ours.yaml")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model_config(tmp_path / "broken.json")
    contents: list[object] = [[], {}, 3]
    for nothing in contents:
        with pytest.raises(ConfigError, match=r"not a mapping|has no fields"):
            load_model_config(write(tmp_path / "nothing.json", nothing))
    with pytest.raises(ConfigError, match=r"no preset of that name \(.*v3-671b"):
        load_model_config("v4-1t")
    with pytest.raises(ConfigError, match="no such file"):
        load_model_config("v" * 5000)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model_config(tmp_path / "..")


@pytest.mark.parametrize("ids", ["end", [1, True], 1.0, 331, -1, [[1]]])
def test_end_tokens_of_generation_config_are_checked(ids: object, tmp_path: Path) -> None:
    write(tmp_path / "config.json", hf_config_dict(TINY))
    write(tmp_path / "generation_config.json", {"eos_token_id": ids})
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id="):
        load_model_config(tmp_path)


def test_fp8_survives_hugging_face(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, quantization=dataclasses.replace(FP8, scale_fmt="ue8m0"))
    assert load_model_config(write(tmp_path / "config.json", hf_config_dict(config))) == config


def test_recast_configs_keep_no_trace_of_the_old_type(tmp_path: Path) -> None:
    """The inference fields of DeepSeek, which some tools merge into the file, included."""
    stored = dataclasses.replace(TINY, quantization=dataclasses.replace(FP8, scale_fmt="ue8m0"))
    merged = hf_config_dict(stored) | {"dtype": "fp8", "scale_fmt": "ue8m0", "future_key": 1}
    file = write(tmp_path / "config.json", recast_config_dict(merged, None))
    assert load_model_config(file) == TINY
    again = recast_config_dict(json.loads(file.read_text()), FP8)
    config = load_model_config(write(file, again))
    assert config == dataclasses.replace(TINY, quantization=FP8)
    assert "future_key" in config.warning
