"""Layers with and without an indexer of their own, in every spelling of config.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_files import hf_config_dict, load_model_config
from dsv3.errors import ConfigError
from tests.checkpoint_files import TINY

KINDS = ("full", "full", "shared", "shared", "shared", "full")
GLM = dataclasses.replace(
    TINY,
    model_type="glm_moe_dsa",
    num_hidden_layers=6,
    num_nextn_predict_layers=1,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=64,
    indexer_rope_interleave=True,
    rms_norm_eps=1e-5,
)
SHARED = dataclasses.replace(GLM, indexer_types=KINDS)
V32 = dataclasses.replace(GLM, model_type="deepseek_v32", indexer_rope_interleave=False)


def read(path: Path, config: ModelConfig, change: dict[str, Any]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(hf_config_dict(config) | change))
    return load_model_config(path)


@pytest.mark.parametrize("config", [GLM, SHARED, V32, dataclasses.replace(TINY)])
def test_what_is_written_reads_back(config: ModelConfig, tmp_path: Path) -> None:
    assert read(tmp_path, config, {}) == config
    assert ("indexer_rope_interleave" in hf_config_dict(config)) == config.has_indexer


@pytest.mark.parametrize(
    "change",
    [
        {"indexer_types": list(KINDS)},
        {"index_topk_pattern": "FFSSSF"},
        {"index_topk_freq": 4},
        {"index_topk_freq": 4, "index_skip_topk_offset": 2, "index_topk_pattern": None},
        {"indexer_types": list(KINDS), "index_topk_freq": 4, "index_topk_pattern": "FFSSSF"},
    ],
)
def test_spellings_of_shared_layers(change: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, GLM, change) == SHARED


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"indexer_types": None},
        {"indexer_types": ["full"] * 6, "index_topk_freq": 1},
        {"index_topk_freq": 1, "index_skip_topk_offset": 3},
    ],
)
def test_all_layers_are_full(change: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, GLM, change) == GLM


@pytest.mark.parametrize("freq", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [None, 0, 1, 2, 3, 7])
def test_the_frequency_is_that_of_transformers(
    freq: int, offset: int | None, tmp_path: Path
) -> None:
    keys = {"index_topk_freq": freq}
    if offset is not None:
        keys["index_skip_topk_offset"] = offset
    theirs = transformers.GlmMoeDsaConfig.from_dict({"num_hidden_layers": 6} | keys).indexer_types
    assert theirs is not None
    if theirs[0] == "shared":
        with pytest.raises(ConfigError, match="must begin with 'full'"):
            read(tmp_path, GLM, keys)
        return
    config = read(tmp_path, GLM, keys)
    assert [config.indexer_kind(layer) for layer in range(6)] == theirs


def test_kinds_of_layers() -> None:
    """The MTP layer, 6, has an indexer in every model that has any."""
    assert [GLM.indexer_kind(layer) for layer in range(7)] == ["full"] * 7
    assert [SHARED.indexer_kind(layer) for layer in range(7)] == [*KINDS, "full"]
    assert TINY.indexer_kind(0) is None


def test_the_first_layers() -> None:
    assert SHARED.first_layers(3).indexer_types == KINDS[:3]
    assert GLM.first_layers(3) == dataclasses.replace(GLM, num_hidden_layers=3)


def test_shared_layers_have_no_indexer_tensors() -> None:
    found = {int(name.split(".")[2]) for name in tensor_specs(SHARED) if ".indexer." in name}
    assert found == {0, 1, 5, 6}
    assert len(tensor_specs(GLM)) - len(tensor_specs(SHARED)) == 3 * 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"indexer_types": list(KINDS), "index_topk_freq": 1},
            r"indexer_types=\('full', .*\) and index_topk_freq=\('full', .*\) disagree",
        ),
        ({"indexer_types": list(KINDS), "index_topk_pattern": "FFSSSS"}, "index_topk_pattern.*dis"),
        ({"indexer_types": "full"}, "indexer_types='full' must be a list of strings"),
        ({"indexer_types": [1] * 6}, "must be a list of strings"),
        ({"indexer_types": list(KINDS[:5])}, "must be num_hidden_layers=6 x 'full' or 'shared'"),
        ({"indexer_types": ["full"] * 5 + ["shard"]}, "must be num_hidden_layers=6 x 'full' or"),
        ({"indexer_types": ["shared"] * 6}, "must begin with 'full'"),
        ({"index_topk_pattern": "FXSSSF"}, "index_topk_pattern='FXSSSF' must be a string of 'F'"),
        ({"index_topk_freq": 0}, "index_topk_freq=0 must be an integer, at least 1"),
        ({"index_topk_freq": 4.0}, "index_topk_freq=4.0 must be an integer"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": -1}, "index_skip_topk_offset=-1 must"),
        ({"indexer_rope_interleave": 1}, "indexer_rope_interleave=1 must be true or false"),
    ],
)
def test_wrong_lists(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, GLM, change)
    assert "\n" not in str(caught.value)


def test_shared_layers_belong_to_glm(tmp_path: Path) -> None:
    """V3.2 keeps the indexers of layers that an engine chooses to skip: another computation."""
    with pytest.raises(ConfigError, match="shared indexer_types belong to glm_moe_dsa"):
        read(tmp_path, V32, {"index_topk_freq": 4})
    assert read(tmp_path, V32, {"index_topk_freq": 1}) == V32


def test_rotary_order_of_the_indexer(tmp_path: Path) -> None:
    """GLM's is interleaved, V3.2's is not; a file may say otherwise."""
    data = hf_config_dict(GLM)
    del data["indexer_rope_interleave"]
    for model_type, interleaved in (("glm_moe_dsa", True), ("deepseek_v32", False)):
        (tmp_path / "config.json").write_text(json.dumps(data | {"model_type": model_type}))
        assert load_model_config(tmp_path).indexer_rope_interleave == interleaved
    assert read(tmp_path, V32, {"indexer_rope_interleave": True}).indexer_rope_interleave


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "glm4_moe_lite"])
def test_dense_models_have_no_indexer(model_type: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, model_type=model_type)
    for key, value in (("index_topk", 32), ("indexer_rope_interleave", True)):
        with pytest.raises(ConfigError, match=f"{key} belongs to deepseek_v32 and glm_moe_dsa"):
            read(tmp_path, config, {key: value})


@pytest.mark.parametrize(
    ("model_type", "eps"),
    [("deepseek_v3", 1e-6), ("kimi_k2", 1e-6), ("glm4_moe_lite", 1e-5), ("glm_moe_dsa", 1e-5)],
)
def test_epsilon_of_the_latents(model_type: str, eps: float) -> None:
    base = GLM if model_type == "glm_moe_dsa" else dataclasses.replace(TINY, rms_norm_eps=1e-5)
    assert dataclasses.replace(base, model_type=model_type).latent_norm_eps == eps
