"""Which tensors a model has, and that the ranks' slices tile each of them."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.names import from_deepseek, scale_name
from dsv3.checkpoint.region import region_shape
from dsv3.checkpoint.sharding import (
    Split,
    scale_region,
    scale_shape,
    shard_region,
    tensor_region,
    tensor_specs,
)
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig, ParallelConfig, QuantizationConfig
from dsv3.config_files import load_model_config
from dsv3.errors import CheckpointError
from tests.checkpoint_files import FP8, TINY, Tensors, random_tensors, to_deepseek, write_hf

MTP = dataclasses.replace(TINY, num_nextn_predict_layers=1)
SPARSE = dataclasses.replace(
    MTP, model_type="deepseek_v32", index_n_heads=4, index_head_dim=32, index_topk=16
)


def test_v3_has_the_published_tensors() -> None:
    """Counts of the listing of deepseek-ai/DeepSeek-V3, MTP layer and scales included."""
    specs = tensor_specs(load_model_config("v3-671b"))
    scales = [scale_shape(spec.shape) for spec in specs.values() if spec.quantizable]
    assert len(specs) + len(scales) == 91_991
    assert sum(math.prod(spec.shape) for spec in specs.values()) == 684_489_845_504
    assert sum(spec.mtp for spec in specs.values()) == 788


def test_v2_lite_parameters() -> None:
    specs = tensor_specs(load_model_config("v2-lite-16b"))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == 15_706_484_224
    assert not any(name.endswith("e_score_correction_bias") for name in specs)


def test_glm_has_the_published_tensors() -> None:
    """Listing of zai-org/GLM-5.2: MTP layer 78 has no copies of embedding and head."""
    copies = ".78.embed_tokens.weight", ".78.shared_head.head.weight"
    specs = tensor_specs(load_model_config("glm-5.2-744b")).values()
    stored = [spec for spec in specs if not spec.name.endswith(copies)]
    assert len(stored) == 59_585 and len(specs) == 59_587
    num_bytes = sum(math.prod(spec.shape) for spec in stored) * 2
    assert num_bytes / 1e9 == pytest.approx(1506.659, abs=2e-3)


def test_kimi_has_the_published_tensors() -> None:
    """Listing of moonshotai/Kimi-K2.5: int4 experts in three tensors, 335 of an image encoder."""
    names = tensor_specs(load_model_config("kimi-k2.5-1t"))
    num_experts = sum(".experts." in name for name in names)
    assert len(names) + 2 * num_experts + 335 == 208_550


@pytest.mark.parametrize(("world_size", "dp"), [(1, 1), (4, 1), (8, 1), (8, 2)])
def test_shards_tile_every_tensor(world_size: int, dp: int) -> None:
    layouts = [ParallelConfig(world_size=world_size, rank=r, dp=dp) for r in range(world_size)]
    for spec in tensor_specs(SPARSE).values():
        regions = [r for layout in layouts if (r := shard_region(spec, layout)) is not None]
        values = sum(math.prod(region_shape(r)) for r in regions)
        copies = {Split.NONE: world_size, Split.EXPERT: 1}.get(spec.split, dp)
        assert values == copies * math.prod(spec.shape), spec


def test_heads_are_not_split() -> None:
    spec = tensor_specs(TINY)["model.layers.0.self_attn.kv_b_proj.weight"]
    for rank in range(8):
        region = shard_region(spec, ParallelConfig(world_size=8, rank=rank))
        assert region == ((rank * 96, rank * 96 + 96), (0, 128))


@pytest.mark.parametrize(
    ("name", "tp", "sizes"),
    [
        ("3.mlp.shared_experts.up_proj", 16, [128] * 16),
        ("3.mlp.shared_experts.up_proj", 32, [128] * 16 + [0] * 16),
        ("0.mlp.gate_proj", 32, [640] * 28 + [512] + [0] * 3),
        ("0.mlp.down_proj", 32, [640] * 28 + [512] + [0] * 3),
    ],
)
def test_fp8_mlps_are_split_in_whole_blocks(name: str, tp: int, sizes: list[int]) -> None:
    spec = tensor_specs(load_model_config("v3-671b"))[f"model.layers.{name}.weight"]
    layouts = [ParallelConfig(world_size=2 * tp, rank=tp + r, tp=tp, dp=2) for r in range(tp)]
    dim = 1 if "down_proj" in name else 0
    regions = [shard_region(spec, layout) for layout in layouts]
    bounds = [region[dim] for region in regions if region is not None]
    assert [stop - start for start, stop in bounds] == sizes
    assert all(a[1] == b[0] for a, b in pairwise(bounds)) and bounds[0][0] == 0


def test_scales_cover_cut_blocks() -> None:
    assert scale_region(((96, 192), (0, 320))) == ((0, 2), (0, 3))
    assert scale_region(((128, 256), (0, 320))) == ((1, 2), (0, 3))
    assert scale_region(((331, 331), (0, 320))) == ((2, 2), (0, 3))
    name = scale_name("model.layers.0.self_attn.kv_b_proj.weight")
    layout = ParallelConfig(world_size=8, rank=1)
    assert tensor_region(tensor_specs(TINY), name, (6, 1), layout) == ((0, 2), (0, 1))


@pytest.mark.parametrize("config", [TINY, SPARSE, load_model_config("v2-lite-16b")])
def test_deepseek_names_come_back(config: ModelConfig) -> None:
    names = [name for name, spec in tensor_specs(config).items() if not spec.mtp]
    for name in names + [scale_name(name) for name in names if name.endswith("proj.weight")]:
        assert from_deepseek(to_deepseek(name)) == name


def test_deepseek_names() -> None:
    assert to_deepseek("lm_head.weight") == "head.weight"
    experts = "layers.3.ffn.experts.17.w2.scale"
    assert to_deepseek("model.layers.3.mlp.experts.17.down_proj.weight_scale_inv") == experts
    indexer = "layers.0.attn.indexer.wq_b.scale"
    assert to_deepseek("model.layers.0.self_attn.indexer.wq_b.weight_scale_inv") == indexer


def make(path: Path, config: ModelConfig, tensors: Tensors) -> tuple[str, ...]:
    with open_source(write_hf(path, config, tensors)) as source:
        return check_tensors(source)


@pytest.mark.parametrize("quantization", [None, FP8])
def test_complete_checkpoints(quantization: QuantizationConfig | None, tmp_path: Path) -> None:
    config = dataclasses.replace(SPARSE, quantization=quantization)
    assert make(tmp_path, config, random_tensors(config)) == ()


def test_absent_mtp_layers_and_tied_heads_are_reported(tmp_path: Path) -> None:
    config = dataclasses.replace(MTP, tie_word_embeddings=True)
    tensors = random_tensors(TINY)
    del tensors["lm_head.weight"]
    absent = make(tmp_path, config, tensors)
    assert set(absent) == set(tensor_specs(config)) - set(tensors)


Q_B = "model.layers.0.self_attn.q_b_proj.weight"
GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({Q_B: None, scale_name(Q_B): None}, f"tensor {Q_B} is missing"),
        ({scale_name(Q_B): None}, f"{scale_name(Q_B)} is missing"),
        ({Q_B: None}, "the weight that it belongs to, .* is absent"),
        ({Q_B: ("F8_E4M3", (2, 2), bytes(4))}, r"is \[2, 2\], the config makes it \[384, 136\]"),
        (
            {Q_B: ("F8_E4M3", (2, 2), bytes(4))},
            "values, num_attention_heads=8, qk_nope_head_dim=32, qk_rope_head_dim=16",
        ),
        (
            {scale_name(Q_B): ("F32", (3, 1), bytes(12))},
            r"is \[3, 1\]; .* with other scales .*\[3, 2\]",
        ),
        ({GATE: ("F8_E4M3", (8, 320), bytes(2560))}, f"{GATE} cannot be of type F8_E4M3"),
        (
            {GATE: ("I16", (8, 320), bytes(5120))},
            f"{GATE} .* I16; it is read as one of F32, BF16, F16",
        ),
        (
            {Q_B: ("F32", (384, 136), bytes(208896))},
            f"is F32, but {scale_name(Q_B)} is stored, too",
        ),
        ({"model.layers.0.mlp.x.weight": ("F32", (1,), bytes(4))}, "not part of this model"),
        ({"model.layers.2.enorm.weight": ("F32", (1,), bytes(4))}, "num_nextn_predict_layers=0"),
        (
            {"model.layers.1.mlp.experts.0.up_proj.weight_packed": ("I32", (1,), bytes(4))},
            r"up_proj.weight_packed is not part of this model: .*\.weight is stored, too, as F8",
        ),
    ],
)
def test_faults_name_the_tensor(
    change: dict[str, tuple[str, tuple[int, ...], bytes] | None], words: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY, quantization=FP8)
    tensors = {**random_tensors(config), **change}
    with pytest.raises(CheckpointError, match=words):
        make(tmp_path, config, {name: t for name, t in tensors.items() if t is not None})
