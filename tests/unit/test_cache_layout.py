import dataclasses

import pytest
import torch

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.config_files import load_model_config
from dsv3.distributed.collectives import SingleRank
from dsv3.settings import CacheDtype, CacheForm, KvShard
from tests.checkpoint_files import TINY

WORLDS = (1, 2, 3, 4, 8, 48)


FORMS: list[tuple[CacheForm, KvShard]] = [
    ("latent", "tokens"),
    ("latent", "none"),
    ("heads", "tokens"),
]


def layouts(
    form: CacheForm, kv_shard: KvShard, tp: int, dtype: CacheDtype = "bf16"
) -> list[CacheLayout]:
    config = dataclasses.replace(TINY, num_attention_heads=48, n_routed_experts=48)
    return [CacheLayout.make(config, form, kv_shard, dtype, tp, r) for r in range(tp)]


@pytest.mark.parametrize("tp", WORLDS)
def test_page_size_is_the_same_for_all_layouts_and_ranks(tp: int) -> None:
    all_layouts = [layout for form, shard in FORMS for layout in layouts(form, shard, tp)]
    sizes = {layout.page_size for layout in all_layouts}
    assert len(sizes) == 1
    size = sizes.pop()
    assert size % 64 == 0 and size % tp == 0
    assert [all_layouts[0].pages_for(n) for n in (0, 1, size, size + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize("tp", WORLDS)
def test_positions_are_sharded_evenly(tp: int) -> None:
    ranks = layouts("latent", "tokens", tp)
    assert [r.paging.slots_per_page * tp for r in ranks] == [r.page_size for r in ranks]
    for n in (0, 1, tp - 1, tp, tp + 1, 1000):
        positions = [[p for p in range(n) if p % tp == r.paging.shard] for r in ranks]
        assert [r.paging.local_len(n) for r in ranks] == [len(p) for p in positions], n


@pytest.mark.parametrize("tp", WORLDS)
def test_bytes_per_rank_are_divided_by_tp(tp: int) -> None:
    """For sharded heads and for sharded tokens; without sharding every rank stores all entries."""

    def page_bytes(layout: CacheLayout) -> float:
        pool = CachePool(layout, 3, torch.device("cpu"), SingleRank())
        assert pool.num_bytes == pool.planes[0].untyped_storage().nbytes()
        return pool.num_bytes / layout.page_size

    cases: list[tuple[CacheForm, KvShard, int]] = [
        ("latent", "tokens", tp),
        ("heads", "tokens", tp),
    ]
    for form, shard, parts in cases:
        whole = page_bytes(layouts(form, shard, 1)[0])
        assert [page_bytes(r) * parts for r in layouts(form, shard, tp)] == [whole] * tp
    whole = page_bytes(layouts("latent", "none", 1)[0])
    assert [page_bytes(r) for r in layouts("latent", "none", tp)] == [whole] * tp


def test_published_sizes() -> None:
    """V3 has 70,272 bytes of bf16 latents per token in 61 layers; expanded heads 57 times that."""
    config = load_model_config("v3-671b")
    latent = CacheLayout.make(config, "latent", "tokens", "bf16", 8, 3)
    assert latent.position_bytes == 70_272
    heads = CacheLayout.make(config, "heads", "tokens", "bf16", 8, 3)
    assert heads.position_bytes == 624_640
    packed = CacheLayout.make(config, "latent", "tokens", "fp8", 8, 3)
    assert packed.main.entry_bytes == 656


def test_gather_returns_position_order() -> None:
    layout = layouts("latent", "none", 1, "fp32")[0]
    pool = CachePool(layout, 4, torch.device("cpu"), SingleRank())
    cache = pool.layer(0)
    cache.slots.copy_(torch.arange(4 * 64.0)[:, None].expand(-1, cache.slots.shape[1]))
    got = cache.gather(torch.tensor([3, 1]), 70, torch.float32)[:, 0]
    assert got.tolist() == [*range(192, 256), *range(64, 70)]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_round_equals_write_and_gather(dtype: CacheDtype) -> None:
    layout = layouts("latent", "none", 1, dtype)[0]
    pool = CachePool(layout, 2, torch.device("cpu"), SingleRank())
    cache, entry = pool.layer(0), torch.randn(5, layout.main.width)
    cache.write(torch.arange(64, 69), entry)
    read = cache.gather(torch.tensor([1]), 5, entry.dtype)
    assert torch.equal(cache.round(entry), read) and not torch.equal(read, entry)
    assert bool((cache.slots[:64] == 0).all())
