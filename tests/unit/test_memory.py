"""The memory plan equals the allocations of the model and the cache."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.checkpoint.load import fp8_weights, load_weights
from dsv3.checkpoint.region import region_shape
from dsv3.checkpoint.sharding import shard_region, tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_files import PRESETS, load_model_config
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.engine.memory import MemoryPlan, free_memory, plan_memory, weight_bytes
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix
from dsv3.settings import EngineConfig
from dsv3_kernels.testing import assert_bitwise_equal
from tests.checkpoint_files import FP8, TINY, random_tensors, write_hf

CPU = torch.device("cpu")
NO_FP8: frozenset[str] = frozenset()
SPARSE = dataclasses.replace(
    TINY, model_type="deepseek_v32", index_n_heads=4, index_head_dim=32, index_topk=16
)
LITE = dataclasses.replace(
    TINY,
    model_type="deepseek_v2",
    q_lora_rank=None,
    scoring_func="softmax",
    topk_method="greedy",
    n_group=1,
)
FAMILIES = {
    "v3": TINY,
    "v3-fp8": dataclasses.replace(TINY, quantization=FP8),
    "v3-fp8, narrow": dataclasses.replace(
        TINY, quantization=FP8, intermediate_size=9, moe_intermediate_size=5
    ),
    "v3 with mtp": dataclasses.replace(TINY, num_nextn_predict_layers=1),
    "v3.2-fp8": dataclasses.replace(SPARSE, quantization=FP8),
    "v2-lite": LITE,
    "no shared experts": dataclasses.replace(TINY, n_shared_experts=0),
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
}


def mesh_of(layout: ParallelConfig, device: torch.device = CPU) -> Mesh:
    return Mesh(layout, device, SingleRank(), SingleRank(), SingleRank(), 1)


def model_of(config: ModelConfig, layout: ParallelConfig, fmt: WeightFormat) -> Transformer:
    return Transformer(config, mesh_of(layout, fmt.device), fmt)


def planned(config: ModelConfig, layout: ParallelConfig, fmt: WeightFormat) -> int:
    return weight_bytes(config, mesh_of(layout), fmt)


def held(model: Transformer) -> int:
    """Bytes behind every tensor of the model, counted once per storage."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
@pytest.mark.parametrize("world_size", [1, 8])
def test_published_models(preset: str, world_size: int) -> None:
    config = load_model_config(preset)
    # One layer with experts is like the next.
    config = config.first_layers(config.first_k_dense_replace + 1)
    tp = math.gcd(world_size, config.num_attention_heads)
    layout = ParallelConfig(world_size=world_size, rank=world_size - 1, tp=tp, dp=world_size // tp)
    layout.check(config)
    elements = dict.fromkeys(("matrices", "vectors"), 0)
    for spec in tensor_specs(config).values():
        region = None if spec.mtp else shard_region(spec, layout)
        if region is not None:
            kinds = ("mlp.gate.weight", "weights_proj.weight")
            is_float32 = len(region) == 1 or spec.name.endswith(kinds)
            elements["vectors" if is_float32 else "matrices"] += math.prod(region_shape(region))
    want = 2 * elements["matrices"] + 4 * elements["vectors"]
    assert planned(config, layout, WeightFormat(torch.bfloat16, CPU)) == want


@pytest.mark.parametrize(
    ("family", "keep_fp8"),
    [*((f, False) for f in FAMILIES), *((f, True) for f in FAMILIES if "fp8" in f)],
)
def test_every_family_and_world(family: str, keep_fp8: bool, tmp_path: Path) -> None:
    config = FAMILIES[family]
    tensors = random_tensors(config)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    with open_source(write_hf(tmp_path / "hf", config, tensors)) as source:
        names = fp8_weights(source) if keep_fp8 else NO_FP8
        assert bool(names) == keep_fp8
        for world_size in (1, 2, 4, 8):
            for rank in range(world_size):
                layout = ParallelConfig(world_size=world_size, rank=rank)
                fmt = WeightFormat(torch.float32, CPU, names)
                model = model_of(config, layout, fmt)
                load_weights(source, model.targets(), layout)
                num_bytes = planned(config, layout, fmt)
                assert num_bytes == held(model) == model.num_bytes, (world_size, rank)
                for module in model.modules():
                    if isinstance(module, Matrix):
                        for e in range(len(module.names)):
                            assert module.matrix(e).dtype == torch.float32


# The more ranks, the more shards cut blocks.
WHOLE = dataclasses.replace(
    TINY,
    quantization=FP8,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=384,
    q_lora_rank=256,
)


def test_fp8_products(tmp_path: Path) -> None:
    """Whole blocks stay FP8 with packed scales, the rest is dequantized: planned to the byte."""
    kept = set()
    with open_source(write_hf(tmp_path / "hf", WHOLE, random_tensors(WHOLE))) as source:
        for world_size in (1, 2, 4, 8):
            layout = ParallelConfig(world_size=world_size, rank=world_size - 1)
            fmt = WeightFormat(torch.bfloat16, CPU, fp8_weights(source), fp8_products=True)
            model = model_of(WHOLE, layout, fmt)
            plain = model_of(WHOLE, layout, WeightFormat(torch.bfloat16, CPU))
            load_weights(source, model.targets(), layout)
            load_weights(source, plain.targets(), layout)
            assert planned(WHOLE, layout, fmt) == held(model) == model.num_bytes
            for (name, got), want in zip(model.named_modules(), plain.modules(), strict=True):
                if not isinstance(got, Matrix):
                    continue
                assert got.quantizes == (got.weight.dtype == torch.float8_e4m3fn)
                if got.quantizes and got.weight.numel():
                    kept.add((world_size, name.split(".", 3)[-1]))
                assert isinstance(want, Matrix)
                for e in range(len(got.names)):
                    assert_bitwise_equal(name, got.matrix(e), want.matrix(e))
    both = {"in_proj", "q_b_proj", "o_proj", "gate_up_proj", "down_proj"}
    shared = {"shared_experts.gate_up_proj", "shared_experts.down_proj"}
    assert {n for w, n in kept if w == 1} == both | shared
    assert {n for w, n in kept if w == 2} == (both | shared) - {"q_b_proj"}  # 192 rows
    assert {n for w, n in kept if w == 8} == {"in_proj", "gate_up_proj", "down_proj"}


def test_keeping_fp8_takes_a_quarter() -> None:
    config = load_model_config("v3-671b")
    names = frozenset(
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight"
        for i in range(3, 61)
        for e in range(256)
        for p in ("gate", "up", "down")
    )
    layout = ParallelConfig(world_size=8, rank=0)
    plain, kept = (WeightFormat(torch.bfloat16, CPU, fp8) for fp8 in (NO_FP8, names))
    saved = planned(config, layout, plain) - planned(config, layout, kept)
    experts = 58 * 32 * 3 * 7168 * 2048
    assert saved == experts - 4 * experts // 128**2


def plan(
    settings: EngineConfig, free: int, tp: int = 1, weights: int = 10_000_000
) -> tuple[CacheLayout, MemoryPlan]:
    layout = CacheLayout.make(TINY, settings.cache_form, settings.kv_shard, "fp32", tp, 0)
    return layout, plan_memory(settings, layout, weights, 256, free, CPU)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("size", ["auto", "1000tok", "500KiB"])
def test_the_cache_is_what_was_planned(tp: int, size: str) -> None:
    layout, planned = plan(EngineConfig(kv_cache_size=size, max_running=8), 10**9, tp)
    pool = CachePool(layout, planned.num_pages, CPU, SingleRank())
    assert planned.cache_tokens * planned.bytes_per_token == pool.num_bytes
    # 144 values of 4 bytes in two layers, dealt to tp ranks.
    assert planned.bytes_per_token == 144 * 4 * 2 / tp
    pages = {"auto": 8 * 256 // 64, "1000tok": 16, "500KiB": 500 * 1024 * tp // (64 * 1152)}
    assert planned.num_pages == pages[size]
    assert str(planned.cache_tokens) in planned.describe().replace(",", "")


def test_auto_leaves_memory_for_others() -> None:
    """A quarter of the memory left by the weights, on a CPU."""
    page = 64 * 1152
    _, planned = plan(EngineConfig(), 10_000_000 + 100 * page)
    assert planned.num_pages == 25


@pytest.mark.parametrize(
    ("size", "free"),
    [
        ("auto", 10_000_000),  # the weights alone
        ("auto", 10_000_000 + 3 * 64 * 1152),  # a quarter of it is no page
        ("90%", 10_000_000 + 64 * 1152),  # room for the null page only
        ("1000tok", 10_000_000 + 16 * 64 * 1152),  # one page short: the null page counts
    ],
)
def test_too_little(size: str, free: int) -> None:
    with pytest.raises(ConfigError, match="use more ranks, weights=fp8 or a smaller"):
        plan(EngineConfig(kv_cache_size=size), free)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (
            "1KiB",
            "1,024 bytes on each rank, less than one page: a page of 64 tokens takes 73,728",
        ),
        ("65536", "to give tokens, write 65536tok"),
        ("0.001%", "less than two pages (one is always kept): a page of 64 tokens takes 73,728"),
    ],
)
def test_less_than_a_page_is_refused_with_the_way_to_give_tokens(size: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(EngineConfig(kv_cache_size=size), 10**9)
    assert str(refused.value).startswith(f"kv_cache_size={size} is ")
    assert words in str(refused.value) and "tok" in str(refused.value)


def test_a_share_is_one_of_what_the_weights_leave() -> None:
    """The page that no sequence uses counts; measured steps are taken off before."""
    page = 64 * 1152
    _, planned = plan(EngineConfig(kv_cache_size="90%"), 10_000_000 + 100 * page)
    assert planned.num_pages == 89
    layout, planned = plan(EngineConfig(kv_cache_size="100%"), 10_000_000 + 100 * page)
    assert planned.num_pages == 99
    settings, free = EngineConfig(kv_cache_size="50%"), 10_000_000 + 100 * page
    measured = plan_memory(settings, layout, 10_000_000, 256, free, CPU, 8 * page)
    assert measured.num_pages == (100 - 8 - 1 - 1) // 2 - 1


def test_a_share_of_host_memory() -> None:
    page = 64 * 1152
    settings, free = EngineConfig(kv_host_cache="25%", kv_cache_size="64tok"), 10**9
    layout = CacheLayout.make(TINY, settings.cache_form, settings.kv_shard, "fp32", 1, 0)
    planned = plan_memory(
        settings, layout, 0, 256, free, torch.device("cuda"), host_free=100 * page
    )
    assert planned.host_pages == 25


def test_the_host_cache_takes_from_the_same_memory_on_a_cpu() -> None:
    page = 64 * 1152
    settings = EngineConfig(kv_host_cache=str(40 * page + 1), kv_cache_size="640tok")
    free = 10_000_000 + (40 + 10 + 1) * page
    _, planned = plan(settings, free)
    assert planned.host_pages == 40 and "host cache 2.812 MiB (2,560 tokens)" in planned.describe()
    with pytest.raises(ConfigError, match="a smaller kv_cache_size"):
        plan(settings, free - 1)
    with pytest.raises(ConfigError, match="kv_host_cache=1KiB holds no page of 72 KiB"):
        plan(EngineConfig(kv_host_cache="1KiB"), free)
    # Pages on their way to and from disk need room too: that of a longest sequence.
    _, planned = plan(EngineConfig(kv_disk_cache="dir:1GiB"), 10**9)
    assert planned.host_pages == 256 // 64


def test_free_memory_is_shared_by_the_ranks_of_a_host() -> None:
    assert 0 < free_memory(CPU, 1000) < free_memory(CPU, 1)


def test_auto_leaves_what_a_step_was_measured_to_need() -> None:
    settings = EngineConfig(max_running=10**6, max_batch_tokens=10**6)
    layout, _ = plan(settings, 10**9)
    measured = plan_memory(settings, layout, 10**7, 256, 10**9, CPU, activations=8 * 10**7)
    page_bytes = 64 * 1152
    left = 10**9 - 10**7 - 9 * 10**7 - (measured.num_pages + 1) * page_bytes
    assert 0 <= left < page_bytes
