"""Configurations: derived values, and the errors of invalid ones."""

import dataclasses
import math
from typing import Any

import pytest

from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import (
    ModelConfig,
    ParallelConfig,
    QuantizationConfig,
    split_range,
)
from dsv3.config_fields import RULES
from dsv3.config_files import load_model_config
from dsv3.config_rope import RopeScaling
from dsv3.errors import ConfigError
from tests.checkpoint_files import TINY

PRESET_SCALES = {
    "v2-lite-16b": 0.114721,
    "v2-236b": 0.114721,
    "v2.5-236b": 0.135234,
    "v3-671b": 0.135234,
    "v3.2-671b": 0.135234,
    "kimi-k2-1t": 0.130861,
    "kimi-k2-0905-1t": 0.144680,
    "kimi-k2.5-1t": 0.144680,
    "moonlight-16b": 0.072169,
    "glm-5-744b": 0.0625,
    "glm-5.2-744b": 0.0625,
    "glm-4.7-flash-30b": 0.0625,
}


@pytest.mark.parametrize(("preset", "scale"), PRESET_SCALES.items())
def test_softmax_scale_of_published_models(preset: str, scale: float) -> None:
    config = load_model_config(preset)
    assert config.softmax_scale == pytest.approx(scale, abs=1e-6)
    assert config.cos_sin_mscale == 1.0


def test_softmax_scale_without_yarn() -> None:
    config = dataclasses.replace(TINY, rope_scaling=None)
    assert config.softmax_scale == pytest.approx(48**-0.5)


def test_moe_layers() -> None:
    config = load_model_config("v3-671b")
    assert [config.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


@pytest.mark.parametrize("preset", [*PRESET_SCALES, None])
def test_active_params_are_those_of_the_tensors(preset: str | None) -> None:
    config = load_model_config(preset) if preset else TINY
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    total = 0.0
    for spec in tensor_specs(config).values():
        is_matrix = "proj" in spec.name or spec.name.endswith("mlp.gate.weight")
        if is_matrix and ".indexer." not in spec.name:
            share = config.num_experts_per_tok / config.n_routed_experts
            total += math.prod(spec.shape) * (share if ".mlp.experts." in spec.name else 1)
    assert config.active_params == pytest.approx(total)


def test_attention_share_of_v3() -> None:
    """Attending to 15 thousand positions costs as many FLOPs as everything else."""
    assert 1 / load_model_config("v3-671b").attention_share == pytest.approx(14_500, rel=0.03)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "only models of DeepSeek's V2/V3 architecture"),
        ({"model_type": ["deepseek_v3"]}, "only models of DeepSeek's V2/V3 architecture"),
        ({"hidden_size": 0}, "hidden_size=0 must be a positive integer"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15 must be even"),
        ({"n_group": 3}, "n_group=3 does not divide n_routed_experts=8"),
        ({"topk_group": 3}, "topk_group=3 is more than n_group=2"),
        ({"num_experts_per_tok": 5}, "more than the 4 experts that routing can reach"),
        ({"scoring_func": "softmax"}, "noaux_tc' with scoring_func='softmax' is not supported"),
        ({"topk_method": ["greedy"]}, "with scoring_func='sigmoid' is not supported"),
        ({"index_topk": 32}, "index_topk belongs to deepseek_v32 and glm_moe_dsa, not to"),
        ({"model_type": "deepseek_v32"}, "index_n_heads=None must be a positive integer"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8'"),
        ({"num_hidden_layers": 2**16}, f"n_routed_experts=8 .* more than {2**18} experts"),
        ({"bos_token_id": 331}, "bos_token_id=331 is outside vocab_size=331"),
        ({"eos_token_ids": (1, 331)}, "eos_token_id=331 is outside vocab_size=331"),
        ({"eos_token_ids": (-1,)}, "eos_token_id=-1 must be a token id"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling={'factor': 4} must be a RopeScaling"),
    ],
)
def test_bad_fields(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        dataclasses.replace(TINY, **change)


def numbers(kind: type) -> list[tuple[type, str, object]]:
    """Return the fields of a dataclass that hold numbers or truths, with their types."""
    types = (int, float, bool, int | None)
    return [(kind, f.name, f.type) for f in dataclasses.fields(kind) if f.type in types]


NUMBERS = numbers(ModelConfig) + numbers(RopeScaling)


def with_value(kind: type, name: str, value: Any) -> ModelConfig | RopeScaling:
    if kind is ModelConfig:
        return dataclasses.replace(TINY, **{name: value})
    assert TINY.rope_scaling is not None
    return dataclasses.replace(TINY.rope_scaling, **{name: value})


@pytest.mark.parametrize(("kind", "name", "type_"), NUMBERS, ids=lambda value: str(value))
def test_numbers_have_types_and_ranges(kind: type, name: str, type_: object) -> None:
    wrong: list[object] = ["1", [], {}, -1, math.nan, math.inf, -math.inf, 10**400, 2**63]
    if type_ is not bool:
        wrong += [True, False]
    if type_ in (int, int | None):
        wrong += [48.0, 1.5]
    if type_ != int | None:
        wrong.append(None)
    for value in wrong:
        if value == 2**63 and type_ is float:
            continue  # a number is as good as its float
        with pytest.raises(ConfigError, match=rf"\b{name}=.* must be ") as caught:
            with_value(kind, name, value)
        assert len(str(caught.value)) < 200


def test_every_number_has_a_rule() -> None:
    assert sorted(RULES) == sorted({name for _, name, _ in NUMBERS})


def test_whole_numbers_are_accepted_as_floats() -> None:
    assert TINY.rope_scaling is not None
    whole = dataclasses.replace(TINY.rope_scaling, factor=4, mscale=1)
    config = dataclasses.replace(TINY, rope_theta=10000, rope_scaling=whole)
    assert config == TINY
    assert type(config.rope_theta) is type(whole.factor) is float


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 0.5}, r"rope_scaling.factor=0.5 must be a number, at least 1"),
        ({"beta_fast": 0}, r"rope_scaling.beta_fast=0 must be a number above 0"),
        ({"beta_fast": 1, "beta_slow": 2}, r"beta_fast=1.0 must be at least beta_slow=2.0"),
        ({"original_max_position_embeddings": 4096.0}, r"4096.0 must be a positive integer"),
    ],
)
def test_bad_yarn(change: dict[str, Any], words: str) -> None:
    values = {"factor": 4.0, "original_max_position_embeddings": 4096} | change
    with pytest.raises(ConfigError, match=words):
        RopeScaling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [(128, 64), (128.0, 128.0), 128, None, (True, True)])
def test_bad_blocks(block: object) -> None:
    with pytest.raises(ConfigError, match=r"weight_block_size=.* must be"):
        QuantizationConfig(block=block)  # type: ignore[arg-type]


def test_layout_is_tp_fastest() -> None:
    layout = ParallelConfig(world_size=8, rank=6, dp=2)
    assert (layout.tp, layout.tp_rank, layout.dp_rank, layout.ep, layout.ep_rank) == (4, 2, 1, 8, 6)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"world_size": 4, "tp": 3}, "tp=3 x dp=1 is not world_size=4"),
        ({"world_size": 3, "dp": 2}, "tp=1 x dp=2 is not world_size=3"),
        ({"world_size": 2, "rank": 2}, "rank=2 is not in 0..1"),
        ({"world_size": 0}, "^world_size=0 must be at least 1$"),
        ({"world_size": 2, "dp": 0}, "^dp=0 must be at least 1$"),
        ({"world_size": 2, "tp": -1}, "^tp=-1 must be at least 0$"),
    ],
)
def test_bad_layouts(kwargs: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(**kwargs)


@pytest.mark.parametrize(
    ("model", "world_size", "words"),
    [
        (TINY, 3, r"tp=3 does not divide num_attention_heads=8; use one of \[1, 2, 4, 8\]"),
        (
            dataclasses.replace(TINY, num_attention_heads=12, n_group=1, topk_group=1),
            12,
            r"world_size=12 does not divide n_routed_experts=8; use one of \[1, 2, 4\]",
        ),
    ],
)
def test_layout_that_does_not_fit(model: ModelConfig, world_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(world_size=world_size).check(model)


@pytest.mark.parametrize(("size", "parts"), [(8, 4), (331, 8), (5, 4), (3, 8), (0, 2)])
def test_split_range_tiles(size: int, parts: int) -> None:
    ranges = [split_range(size, parts, i) for i in range(parts)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    assert max(stop - start for start, stop in ranges) == -(-size // parts)


@pytest.mark.parametrize(("size", "parts"), [(2048, 32), (18432, 32), (200, 4), (128, 1), (0, 2)])
def test_split_range_in_units(size: int, parts: int) -> None:
    ranges = [split_range(size, parts, i, 128) for i in range(parts)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    assert all(start % 128 == 0 or start == stop for start, stop in ranges)
    blocks = [-(-(stop - start) // 128) for start, stop in ranges]
    assert max(blocks) == math.ceil(math.ceil(size / 128) / parts)
