"""config.json in all its spellings: equal values pass, contradicting and wrong ones do not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dsv3.config import ModelConfig
from dsv3.config_files import hf_config_dict, load_model_config
from dsv3.errors import ConfigError
from dsv3.model.rotary import inverse_frequencies
from tests.checkpoint_files import FP8, TINY

BASE = hf_config_dict(dataclasses.replace(TINY, quantization=FP8))
YARN: dict[str, Any] = BASE["rope_scaling"]
SPARSE = dataclasses.replace(
    TINY, model_type="deepseek_v32", index_n_heads=4, index_head_dim=32, index_topk=64
)
PLAIN = dataclasses.replace(TINY, quantization=FP8)
NEW_YARN = {k: v for k, v in YARN.items() if k != "type"} | {"rope_type": "yarn"}
# DeepSeek's inference JSON for the same model, as merged into the file by some tools.
INFERENCE = {
    "dim": 320,
    "inter_dim": 600,
    "moe_inter_dim": 200,
    "n_layers": 2,
    "n_dense_layers": 1,
    "n_heads": 8,
    "n_activated_experts": 2,
    "n_expert_groups": 2,
    "n_limited_groups": 1,
    "score_func": "sigmoid",
    "route_scale": 2.5,
    "rope_factor": 4.0,
    "original_seq_len": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "norm_eps": 1e-6,
    "dtype": "fp8",
    "max_seq_len": 16384,
}


def read(path: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> ModelConfig:
    data = {name: value for name, value in BASE.items() if name not in without} | change
    (path / "config.json").write_text(json.dumps(data))
    return load_model_config(path)


def refusal(path: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """Return the error without the file's name, with which it must begin."""
    with pytest.raises(ConfigError) as caught:
        read(path, change, without)
    text, where = str(caught.value), f"{path / 'config.json'}: "
    assert text.startswith(where)
    assert "\n" not in text and len(text) < len(where) + 300
    return text.removeprefix(where)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": NEW_YARN | {"rope_theta": 10000}},
        {"rope_parameters": NEW_YARN, "rope_scaling": None},
        {"rope_parameters": NEW_YARN, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"rope_scaling": YARN | {"rope_type": "yarn"}},
        {"rope_scaling": YARN | {"factor": 4, "beta_slow": None, "rope_theta": 10000}},
        {"rope_scaling": YARN | {"attention_factor": 1.0, "truncate": True}},
        {"rope_scaling": YARN | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
        {"rope_scaling": YARN | {"attention_factor": None, "truncate": None}},
        {"original_max_position_embeddings": 64},
        {"dtype": "bfloat16"},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"torch_dtype": "torch.bfloat16"},
        {"torch_dtype": "float8_e4m3fn", "dtype": "bfloat16"},
        {"num_local_experts": 8, "num_experts": 8, "num_mtp_layers": 0},
        {"num_key_value_heads": None},
        {"head_dim": 16, "qk_head_dim": 48},
        {"head_dim": 48},
        {"head_dim": 40},
        {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]},
        {"eos_token_id": [1]},
        {"mlp_bias": False, "hidden_act": None, "sliding_window": None, "quantization": None},
        {"architectures": "DeepseekV3ForCausalLM", "_attn_implementation": "sdpa"},
        {"quantization_config": BASE["quantization_config"] | {"scale_fmt": "float"}},
        {"quantization_config": BASE["quantization_config"] | {"modules_to_not_convert": ["x"]}},
        INFERENCE,
    ],
)
def test_equal_values_under_several_names(change: dict[str, Any], tmp_path: Path) -> None:
    config = read(tmp_path, change)
    assert config == PLAIN
    assert config.warning == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters.rope_type='default' and rope_scaling.type='yarn' disagree",
        ),
        (
            {"rope_parameters": NEW_YARN | {"factor": 8}},
            "rope_parameters.factor=8.0 and rope_scaling.factor=4.0 disagree",
        ),
        (
            {"rope_parameters": {k: v for k, v in NEW_YARN.items() if k != "beta_fast"}}
            | {"rope_scaling": YARN | {"beta_fast": 16}},
            "rope_parameters.beta_fast=32.0 and rope_scaling.beta_fast=16.0 disagree",
        ),
        (
            {"rope_scaling": YARN | {"rope_type": "default"}},
            "rope_scaling.rope_type='default' and rope_scaling.type='yarn' disagree",
        ),
        (
            {"rope_scaling": YARN | {"rope_theta": 5e4}},
            "rope_theta=10000.0 and rope_scaling.rope_theta=50000.0 disagree",
        ),
        (
            {"original_max_position_embeddings": 4096},
            "original_max_position_embeddings=4096 and "
            "rope_scaling.original_max_position_embeddings=64 disagree",
        ),
        ({"dtype": "float32"}, "torch_dtype='bfloat16' and dtype='float32' disagree"),
        ({"dtype": "bf16"}, "dtype='bf16', but weights are fp8 by quantization_config={"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0', but quantization_config says scale_fmt=None"),
        ({"num_local_experts": 16}, "n_routed_experts=8 and num_local_experts=16 disagree"),
        ({"n_layers": 61}, "num_hidden_layers=2 and n_layers=61 disagree"),
        ({"score_func": "softmax"}, "scoring_func='sigmoid' and score_func='softmax' disagree"),
        ({"rope_factor": 40}, "rope_factor=40, but rope_scaling says factor=4.0"),
        (
            {"rope_factor": 40, "rope_scaling": None},
            "but rope_scaling says no YaRN",
        ),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads=8"),
        ({"num_key_value_heads": 8.0}, "num_key_value_heads=8.0 must be num_attention_heads=8"),
        ({"qk_head_dim": 192}, "qk_head_dim=192 must be qk_nope_head_dim + qk_rope_head_dim=48"),
        ({"head_dim": 128}, "head_dim=128 must be qk_rope_head_dim=16 or"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types=['sparse', 'dense'] must be"),
        ({"mlp_layer_types": ["dense"] * 2}, "first_k_dense_replace=1 and num_hidden_layers=2 say"),
        ({"layer_types": ["full_attention"]}, "layer_types=['full_attention'] must be 2 x"),
        ({"layer_types": ["sliding_attention"] * 2}, "must be 2 x 'full_attention'"),
        (
            {"rope_scaling": YARN | {"attention_factor": 1.2}},
            "rope_scaling.attention_factor=1.2, but factor, mscale and mscale_all_dim give 1;",
        ),
        (
            {"rope_scaling": {k: v for k, v in YARN.items() if k != "mscale"}},
            "mscale=None with mscale_all_dim=1.0 multiplies cosines by 1 in DeepSeek's code and by",
        ),
    ],
)
def test_contradicting_values(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "(Qwen2ForCausalLM)"),
        ({"model_type": "qwen2", "architectures": 7}, "(unknown)"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["deepseek_v3"]}, "model_type=['deepseek_v3']"),
        ({"attention_bias": True}, "attention_bias=True is not supported; it must be False"),
        ({"attention_bias": 0}, "attention_bias=0 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be 'silu'"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported; it must be absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be a mapping"),
        ({"rope_scaling": 4.0}, "rope_scaling=4.0 must be a mapping"),
        ({"rope_scaling": []}, "rope_scaling=[] must be a mapping"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn' must be a mapping"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": YARN | {"type": "YaRN"}}, "rope type 'YaRN' is not supported; only"),
        ({"rope_scaling": YARN | {"type": ["yarn"]}}, "rope type ['yarn'] is not supported"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling has no rope_type"),
        ({"rope_scaling": {"indexed_attention": YARN}}, "rope_scaling has no rope_type"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "rope_scaling: missing field 'original_max",
        ),
        ({"rope_scaling": YARN | {"factor": None}}, "rope_scaling: missing field 'factor'"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling.factor='4' must be"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "rope_scaling.beta_slow=0 must be"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate=False is not"),
        ({"rope_scaling": YARN | {"attn_factor": 0.8}}, "rope_scaling.attn_factor=0.8 is not"),
        ({"rope_scaling": YARN | {"attention_factor": "1"}}, "attention_factor='1' must be"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta='x' must be"),
        ({"rope_theta": "1e4x"}, "rope_theta='1e4x' must be a number above 1"),
        ({"rope_theta": 0}, "rope_theta=0 must be a number above 1"),
        ({"rope_theta": 1}, "rope_theta=1 must be a number above 1"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' must be a mapping"),
        ({"quantization_config": []}, "quantization_config=[] must be a mapping"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantization_config: config_groups=None lists no groups of weights",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8 weights have a scale per tensor"),
        ({"quantization_config": None, "scale_fmt": 8}, "scale_fmt=8 must be 'ue8m0' or absent"),
        ({"quantization_config": {"bits": 4, "group_size": 64}}, "bits=4, group_size=64 (MLX)"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "bits=4, group_size=64 (MLX)"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ".fmt='e5m2' is not"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128.0, 128]}},
            "quantization_config.weight_block_size=(128.0, 128) must be [128, 128]",
        ),
        ({"layer_types": 3}, "layer_types=3 must be"),
        ({"mlp_layer_types": 3}, "mlp_layer_types=3 must be"),
        ({"mlp_layer_types": [[], {}]}, "mlp_layer_types=[[], {}] must be"),
        ({"q_lora_rank": 48.0}, "q_lora_rank=48.0 must be a positive integer"),
        ({"hidden_size": None}, "hidden_size=None must be"),
        ({"hidden_size": "x" * 10**6}, "hidden_size='xxx"),
        ({"hidden_size": 10**400}, "hidden_size=1000"),
        ({"rms_norm_eps": float("nan")}, "not JSON: NaN is not a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be"),
        ({"rms_norm_eps": 1}, "rms_norm_eps=1 must be"),
        ({"rope_interleave": None}, "rope_interleave=None must be true or false"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ({"n_group": 3}, "n_group=3 does not divide"),
        ({"eos_token_id": "end"}, "eos_token_id='end' must be"),
        ({"eos_token_id": [1, 331]}, "eos_token_id=331 is outside vocab_size=331"),
        ({"dim": 320.0}, "dim=320.0 must be a positive integer"),
    ],
)
def test_values_that_no_model_has(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, change)


def test_unknown_keys_are_named_once(tmp_path: Path) -> None:
    more = {
        "future_key": 1,
        "num_expert_per_tok": 8,
        "\x1b[2J": None,
        "rope_scaling": YARN | {"mscale_all": 2},
        "quantization_config": BASE["quantization_config"] | {"scales": "x"},
    }
    config = read(tmp_path, more)
    assert config == PLAIN
    assert config.warning == (
        "config.json: keys without a meaning here are ignored: 'future_key', "
        r"'num_expert_per_tok', '\x1b[2J', 'rope_scaling.mscale_all', 'quantization_config.scales'"
    )


def test_a_plain_rope_says_which_of_its_keys_have_no_meaning(tmp_path: Path) -> None:
    config = read(tmp_path, {"rope_scaling": {"type": "default", "factor": 4.0}})
    assert config.rope_scaling is None
    assert config.warning.endswith("ignored: 'rope_scaling.factor'")


def test_a_hint_names_a_required_field_that_is_absent(tmp_path: Path) -> None:
    misspelt = {"num_expert_per_tok": 2, "rope_scaling": YARN}
    assert refusal(tmp_path, misspelt, ("num_experts_per_tok",)) == (
        "missing field 'num_experts_per_tok'; did you mean it by 'num_expert_per_tok'?"
    )
    rope = {name: value for name, value in YARN.items() if name != "factor"}
    assert refusal(tmp_path, {"rope_scaling": rope | {"factors": 4.0}}) == (
        "rope_scaling: missing field 'factor'; did you mean it by 'factors'?"
    )


def test_groups_that_are_absent_are_not_guessed(tmp_path: Path) -> None:
    assert refusal(tmp_path, {}, ("n_group",)) == "missing field 'n_group'"
    none = {"n_group": None, "topk_group": None}
    assert (read(tmp_path, none).n_group, read(tmp_path, none).topk_group) == (1, 1)


def test_other_names_alone(tmp_path: Path) -> None:
    assert read(tmp_path, {"num_experts": 8}, ("n_routed_experts",)) == PLAIN
    assert read(tmp_path, {"dtype": "float32"}, ("torch_dtype",)).torch_dtype == "float32"
    types = {"mlp_layer_types": ["dense", "sparse"]}
    assert read(tmp_path, types, ("first_k_dense_replace",)) == PLAIN
    rope = {name: value for name, value in YARN.items() if not name.startswith("original")}
    length = {"original_max_position_embeddings": 64}
    assert read(tmp_path, {"rope_scaling": rope, **length}) == PLAIN


def wrapped(path: Path, inner: dict[str, Any], **outer: object) -> ModelConfig:
    """Read the file of a multi-modal model with this text model."""
    data = {"model_type": "kimi_vl", "vision_config": {"hidden_size": 8}, "text_config": inner}
    (path / "config.json").write_text(json.dumps(data | outer))
    return load_model_config(path)


def test_the_text_model_of_a_multi_modal_model(tmp_path: Path) -> None:
    plain = {name: value for name, value in BASE.items() if name != "quantization_config"}
    assert wrapped(tmp_path, BASE) == PLAIN
    outer = {"quantization_config": BASE["quantization_config"], "eos_token_id": 1}
    assert wrapped(tmp_path, plain, **outer) == PLAIN
    words = "eos_token_id=2 and text_config.eos_token_id=1 disagree"
    with pytest.raises(ConfigError, match=words):
        wrapped(tmp_path, BASE, eos_token_id=2)
    with pytest.raises(ConfigError, match="model_type='kimi_vl'"):
        wrapped(tmp_path, BASE | {"model_type": "qwen2"})


@pytest.mark.parametrize("layer_type", ["indexed_attention", "deepseek_sparse_attention"])
def test_keys_of_sparse_attention(layer_type: str, tmp_path: Path) -> None:
    data = hf_config_dict(SPARSE)
    data |= {"indexer_rope_interleave": False, "layer_types": [layer_type] * 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(data))
    config = load_model_config(file)
    assert config == SPARSE and config.warning == ""
    file.write_text(json.dumps(data | {"layer_types": ["full_attention"] * 2}))
    with pytest.raises(ConfigError, match="must be 2 x 'indexed_attention'"):
        load_model_config(file)


CLASSES = [
    transformers.DeepseekV2Config,
    transformers.DeepseekV3Config,
    transformers.DeepseekV32Config,
]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "plain"])
def test_configs_saved_by_transformers(
    kind: type[transformers.PreTrainedConfig], spelling: str, tmp_path: Path
) -> None:
    rope: dict[str, Any] = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope |= {"rope_theta": 5e4, "original_max_position_embeddings": 4096}
    fields: dict[str, Any] = {"num_experts_per_tok": 6, "num_hidden_layers": 2, "dtype": "float32"}
    if spelling != "plain":
        fields[spelling] = rope
    saved = kind(**fields)
    saved.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.warning == ""
    assert (config.num_experts_per_tok, config.num_hidden_layers) == (6, 2)
    assert config.torch_dtype == "float32"
    assert (config.rope_scaling is not None) == (spelling != "plain")
    assert config.rope_theta == (1e4 if spelling == "plain" else 5e4)
    assert config.has_indexer == (kind is transformers.DeepseekV32Config)


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 4.0},
        {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"factor": 4.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
        {"factor": 32.0, "beta_fast": 1, "beta_slow": 1.0},
        {"factor": 32.0, "original_max_position_embeddings": 4},
        {"factor": 1},
    ],
)
def test_yarn_is_that_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "original_max_position_embeddings": 64} | rope
    config = read(tmp_path, {"rope_parameters": rope}, ("rope_scaling",))
    theirs = transformers.DeepseekV3Config.from_pretrained(tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert inverse_frequencies(config).tolist() == pytest.approx(frequencies.tolist(), rel=1e-5)
    assert config.cos_sin_mscale == pytest.approx(factor)
