"""If config and stored tensors disagree, the tensors decide or an error names both values."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.load import has_fp8_experts, has_fp8_weights
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.engine.setup import numerics_mode
from dsv3.errors import CheckpointError, ConfigError
from dsv3.settings import EngineConfig
from tests.checkpoint_files import FP8, TINY, Tensors, random_tensors, write_hf

QUANTIZED = dataclasses.replace(TINY, quantization=FP8)
MTP = dataclasses.replace(TINY, num_nextn_predict_layers=1)
DEEP = dataclasses.replace(TINY, num_hidden_layers=3, num_nextn_predict_layers=1)
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
LAYERS = "model.layers."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("stored", "change", "have", "says"),
    [
        (DEEP, {"num_hidden_layers": 2}, "4 layers", "num_hidden_layers=2"),
        (DEEP, {"num_hidden_layers": 4}, "4 layers", "num_hidden_layers=4"),
        (DEEP, {"num_nextn_predict_layers": 0}, "3 layers and 1 for multi", "predict_layers=0"),
        (
            DEEP,
            {"num_hidden_layers": 4, "num_nextn_predict_layers": 0},
            "4 layers",
            "num_hidden_layers=4 and num_nextn_predict_layers=0",
        ),
        (TINY, {"num_hidden_layers": 1}, "2 layers", "num_hidden_layers=1"),
        (TINY, {"num_hidden_layers": 3}, "2 layers", "num_hidden_layers=3"),
        (TINY, {"n_routed_experts": 4}, "8 routed experts in a layer", "n_routed_experts=4"),
        (TINY, {"n_routed_experts": 16}, "8 routed experts in a layer", "n_routed_experts=16"),
        (TINY, {"first_k_dense_replace": 2}, "routed experts in layer 1", "first_k_dense_repl"),
        (TINY, {"first_k_dense_replace": 0}, "no routed experts in layer 0", "first_k_dense"),
        (TINY, {"vocab_size": 330}, "vocab_size=331", "vocab_size=330"),
        (TINY, {"hidden_size": 384}, "hidden_size=320", "hidden_size=384"),
        (TINY, {"intermediate_size": 512}, "intermediate_size=600", "intermediate_size=512"),
        (TINY, {"moe_intermediate_size": 128}, "moe_intermediate_size=200", "=128"),
        (TINY, {"q_lora_rank": None}, "q_lora_rank=136", "q_lora_rank=None"),
        (TINY, {"kv_lora_rank": 64}, "kv_lora_rank=128", "kv_lora_rank=64"),
        (
            dataclasses.replace(TINY, q_lora_rank=None),
            {"q_lora_rank": 136},
            "q_lora_rank=None",
            "q_lora_rank=136",
        ),
    ],
)
def test_counts_and_sizes(
    stored: ModelConfig, change: dict[str, Any], have: str, says: str, tmp_path: Path
) -> None:
    """The field is named, not the first of many tensors that do not fit."""
    declared = dataclasses.replace(stored, **change)
    with open_source(write_hf(tmp_path, declared, random_tensors(stored))) as source:
        words = f"the files have {have}.*, config.json says .*{re.escape(says)}"
        with pytest.raises(CheckpointError, match=words) as caught:
            check_tensors(source)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_layers_for_speculative_decoding_alone(tmp_path: Path) -> None:
    tensors = random_tensors(MTP)
    draft = {n.replace(".2.", ".0."): t for n, t in tensors.items() if n.startswith(f"{LAYERS}2.")}
    with (
        open_source(write_hf(tmp_path, TINY, draft)) as source,
        pytest.raises(CheckpointError, match="holds layers for multi-token prediction only"),
    ):
        check_tensors(source)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.layers.0.self_attn.indexer.wk.weight", "sparse attention, .* says deepseek_v3"),
        ("model.layers.0.self_attn.q_a_proj.bias", "no model of the family has biases"),
    ],
)
def test_tensors_of_another_model(name: str, hint: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY) | {name: ("BF16", (1,), bytes(2))}
    with (
        open_source(write_hf(tmp_path, TINY, tensors)) as source,
        pytest.raises(CheckpointError, match=f"{name} is not part of this model: .*{hint}"),
    ):
        check_tensors(source)


def test_a_router_bias_that_the_config_leaves_out(tmp_path: Path) -> None:
    greedy = dataclasses.replace(
        TINY, n_group=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False
    )
    with (
        open_source(write_hf(tmp_path, greedy, random_tensors(TINY))) as source,
        pytest.raises(CheckpointError, match=r"correction_bias .* says topk_method=greedy"),
    ):
        check_tensors(source)


def opened(path: Path, config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, list[str]]:
    """Return the config that a directory is read with, and the warnings."""
    with open_source(write_hf(path, config, tensors)) as source:
        check_tensors(source)
        return source.config, list(source_warnings(source))


def test_a_tied_head_that_is_stored_and_differs(tmp_path: Path) -> None:
    config, (line,) = opened(tmp_path, TIED, random_tensors(TINY))
    assert not config.tie_word_embeddings
    assert "tie_word_embeddings is true, but lm_head.weight is stored and differs" in line


def test_a_tied_head_that_is_a_copy(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors[HEAD] = tensors[EMBED]
    assert opened(tmp_path, TIED, tensors)[1] == []


@pytest.mark.parametrize("stored", [EMBED, HEAD])
def test_tied_tensors_of_which_one_is_stored(stored: str, tmp_path: Path) -> None:
    """The stored one is used for both."""
    tensors = random_tensors(TINY)
    del tensors[HEAD if stored == EMBED else EMBED]
    with open_source(write_hf(tmp_path, TIED, tensors)) as source:
        assert check_tensors(source) == (HEAD,)
        assert list(source_warnings(source)) == [] and source.config.tie_word_embeddings
        assert bytes(source.read(EMBED)) == tensors[stored][2]


def test_a_tied_head_of_a_share(tmp_path: Path) -> None:
    """The host of rank 0 may have the file of rank 0 only."""
    with open_source(write_hf(tmp_path / "hf", TIED, random_tensors(TINY))) as source:
        convert(source, make_plan(source, ParallelConfig(world_size=8)), tmp_path / "mp8", 1)
    for rank in range(1, 8):
        (tmp_path / "mp8" / f"model{rank}-mp8.safetensors").unlink()
    with open_source(tmp_path / "mp8", is_share=True) as source:
        (line,) = source_warnings(source)
    assert "lm_head.weight is stored and differs" in line


def config_json(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def test_a_stale_quantization_config(tmp_path: Path) -> None:
    """Numerics follow the weights, and a converted directory describes them correctly."""
    path = write_hf(tmp_path / "hf", QUANTIZED, random_tensors(TINY))
    with open_source(path) as source:
        assert source.config.quantization is None
        (line,) = source_warnings(source)
        assert "quantization_config is stale: no weight is stored in FP8" in line
        assert numerics_mode(EngineConfig(), source, "cuda") == "bfloat16"
        with pytest.raises(
            ConfigError, match=r"the checkpoint has none .its quantization_config is stale"
        ):
            numerics_mode(EngineConfig(dtype="fp8"), source, "cpu")
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    assert "quantization_config" in config_json(path)
    assert "quantization_config" not in config_json(tmp_path / "out")
    with open_source(tmp_path / "out") as source:
        assert list(source_warnings(source)) == []


@pytest.mark.parametrize("dtype", ["F32", "F8_E8M0"])
def test_fp8_weights_without_a_quantization_config(dtype: str, tmp_path: Path) -> None:
    """The weights are read as blocks; scales in E8M0 imply scale_fmt=ue8m0."""
    tensors = random_tensors(QUANTIZED)
    if dtype == "F8_E8M0":
        for name, (_, shape, data) in tensors.items():
            if name.endswith("_scale_inv"):
                tensors[name] = dtype, shape, bytes(len(data) // 4)
    with open_source(write_hf(tmp_path / "hf", TINY, tensors)) as source:
        quantization = source.config.quantization
        assert quantization is not None
        assert quantization.scale_fmt == (None if dtype == "F32" else "ue8m0")
        (line,) = source_warnings(source)
        assert "the config has no quantization_config, but FP8 weights" in line
        assert numerics_mode(EngineConfig(), source, "cuda") == "fp8"
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    with open_source(tmp_path / "out") as source:
        assert source.declared.quantization == quantization and list(source_warnings(source)) == []


def test_fp8_only_where_it_is_not_loaded(tmp_path: Path) -> None:
    """An FP8 layer for multi-token prediction, which is not loaded, in a BF16 model."""
    plain = random_tensors(TINY)
    mixed = random_tensors(dataclasses.replace(MTP, quantization=FP8))
    tensors = {n: t for n, t in mixed.items() if n.startswith("model.layers.2.")} | plain
    config = dataclasses.replace(MTP, quantization=FP8)
    with open_source(write_hf(tmp_path, config, tensors)) as source:
        check_tensors(source)
        assert source.config.quantization == FP8
        assert numerics_mode(EngineConfig(), source, "cuda") == "bfloat16"


@pytest.mark.parametrize("part", ["experts", "self_attn"])
def test_fp8_in_a_part_of_the_model(part: str, tmp_path: Path) -> None:
    """Tokens travel to experts in FP8 only if all experts are stored in it."""
    plain, quantized = random_tensors(TINY), random_tensors(QUANTIZED)
    tensors = {n: t for n, t in plain.items() if f".{part}." not in n}
    tensors |= {n: t for n, t in quantized.items() if f".{part}." in n}
    with open_source(write_hf(tmp_path, QUANTIZED, tensors)) as source:
        check_tensors(source)
        assert has_fp8_weights(source) and has_fp8_experts(source) == (part == "experts")


BLOCK = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [128, 128]}


def compressed(**weights: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": BLOCK | weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def test_blocks_of_compressed_tensors(tmp_path: Path) -> None:
    """A converted directory has the usual scale names and a matching config."""
    tensors = random_tensors(QUANTIZED)
    spelled = {name.removesuffix("_inv"): tensor for name, tensor in tensors.items()}
    path = write_hf(tmp_path / "hf", TINY, spelled)
    config = config_json(path) | {"quantization_config": compressed(block_structure="128x128")}
    (path / "config.json").write_text(json.dumps(config))
    with open_source(path) as source:
        assert source.config.quantization == FP8 and list(source_warnings(source)) == []
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    assert config_json(tmp_path / "out")["quantization_config"]["quant_method"] == "fp8"
    with open_source(tmp_path / "out") as source:
        assert source.config.quantization == FP8
        assert {name: bytes(source.read(name)) for name in tensors} == {
            name: tensor[2] for name, tensor in tensors.items()
        }
        assert make_plan(source, None, Cast.BF16).config.quantization is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": "Linear"}, "group_0.targets='Linear' must be a list of names"),
        ({"targets": None}, "group_0.targets=None must be a list of names"),
        ({"format": "pack-quantized"}, "group_0.format='pack-quantized' must be one of"),
        ({"input_activations": 8}, "group_0.input_activations=8 must be a mapping or absent"),
        ({"output_activations": {}}, "group_0.output_activations is not supported"),
    ],
)
def test_malformed_groups_of_blocks(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = compressed()
    config["config_groups"]["group_0"] |= change
    file = describe(tmp_path, TINY, random_tensors(TINY), config)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_model_config(file)
    assert "\n" not in str(caught.value)


FP4 = compressed(type="float", num_bits=4, strategy="group")
UNSUPPORTED = [
    (FP4, "weights.num_bits=4 is not supported"),
    (compressed(type="int", num_bits=3), "weights.num_bits=3 is not supported"),
    (compressed(strategy="channel"), "group_0.weights.strategy='channel' is not supported"),
    (compressed(block_structure=[1, 128]), "weights.block_structure=[1, 128] is not supported"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    ({"quant_method": "fp8"}, "FP8 weights have a scale per tensor"),
]


def describe(path: Path, config: ModelConfig, tensors: Tensors, quantization: object) -> Path:
    """Write a checkpoint with this quantization_config."""
    file = write_hf(path, config, tensors) / "config.json"
    declared = config_json(path) | {"quantization_config": quantization}
    file.write_text(json.dumps(declared))
    return file


@pytest.mark.parametrize(("quantization", "words"), UNSUPPORTED)
def test_unsupported_quantization_without_weights(
    quantization: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = describe(tmp_path, TINY, random_tensors(TINY), quantization)
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_model_config(file)


@pytest.mark.parametrize(("quantization", "words"), UNSUPPORTED)
def test_unsupported_quantization_that_is_stale(
    quantization: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A merged or dequantized model may keep the quantization_config that it had before."""
    tensors = random_tensors(TINY)
    describe(tmp_path / "hf", TINY, tensors, quantization)
    with open_source(tmp_path / "hf") as source:
        check_tensors(source)
        assert source.config.quantization is None
        warning = source.config.warning
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    assert warning.startswith("config.json: quantization_config: ") and words in warning
    assert warning.endswith("; ignored, the stored tensors decide")
    assert "quantization_config" not in config_json(tmp_path / "out")
    with open_source(tmp_path / "out") as source:
        assert source.config == TINY and source.config.warning == ""


def test_unsupported_quantization_over_fp8_blocks(tmp_path: Path) -> None:
    """The stored form decides here, too."""
    describe(tmp_path / "hf", TINY, random_tensors(QUANTIZED), FP4)
    with open_source(tmp_path / "hf") as source:
        check_tensors(source)
        assert source.config.quantization == FP8
        assert len(list(source_warnings(source))) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_groups": []}, "config_groups=[] lists no groups"),
        ({"config_groups": {}}, "config_groups={} lists no groups"),
        ({"config_groups": {"g": 1}}, "config_groups.g has no weights"),
        ({"config_groups": {"g": {}}}, "config_groups.g has no weights"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "activations are not rotated"),
    ],
)
def test_compressed_tensors_of_wrong_types(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    describe(tmp_path, TINY, random_tensors(TINY), compressed() | change)
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_source(tmp_path)
