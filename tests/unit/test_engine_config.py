import re
from pathlib import Path

import pytest

from dsv3.engine.config import EngineConfig
from dsv3.engine.sizes import CacheSize, Size
from dsv3.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", CacheSize()),
        ("4096", CacheSize(num_bytes=4096)),
        ("3KiB", CacheSize(num_bytes=3072)),
        ("5mib", CacheSize(num_bytes=5 * 2**20)),
        ("2GiB", CacheSize(num_bytes=2**31)),
        ("4G", CacheSize(num_bytes=4 * 2**30)),
        ("4GB", CacheSize(num_bytes=4 * 10**9)),
        ("1.5GiB", CacheSize(num_bytes=3 * 2**29)),
        (".5g", CacheSize(num_bytes=2**29)),
        ("512M", CacheSize(num_bytes=2**29)),
        ("1 TiB", CacheSize(num_bytes=2**40)),
        ("17b", CacheSize(num_bytes=17)),
        ("90%", CacheSize(share=0.9)),
        ("100%", CacheSize(share=1.0)),
        ("65536tok", CacheSize(num_tokens=65536)),
        ("64 tokens", CacheSize(num_tokens=64)),
    ],
)
def test_cache_size(text: str, size: CacheSize) -> None:
    assert CacheSize.parse(text) == size


WRONG = ("", "-1", "1.5", "tok", "all", "4GX", "4iB", "1e9", "1,000", "101%", "-5%", "4G 2M", "G")


@pytest.mark.parametrize("text", [*WRONG, "0", "0tok", "0%", "0G", "1.5tok", "off"])
def test_wrong_cache_size(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineConfig(kv_cache_size=text)
    for form in (f"--kv-cache-size={text} is", "auto", "4GiB", "1.5G", "90%", "65536tok"):
        assert form in str(refused.value)


@pytest.mark.parametrize("text", [*WRONG, "64tok", "auto"])
def test_wrong_sizes_of_other_caches(text: str) -> None:
    for field, value in (("kv_host_cache", text), ("kv_disk_cache", f"dir:{text}")):
        flag = f"--{field.replace('_', '-')}={text} is not a size; use bytes"
        with pytest.raises(ConfigError, match=re.escape(flag)):
            EngineConfig(**{field: value})


def test_a_share_is_one_of_what_is_there() -> None:
    assert Size(share=0.25).of(1000) == 250
    assert Size(num_bytes=7).of(1000) == 7
    assert EngineConfig(kv_host_cache="25%").host_cache == Size(share=0.25)
    assert EngineConfig(kv_disk_cache="dir:5%").disk_cache == (Path("dir"), Size(share=0.05))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attn_impl", "flash", "--attn-impl=flash is unknown; use one of auto, naive, absorb"),
        ("kv_shard", "heads", "--kv-shard=heads is unknown; use one of tokens, none"),
        ("kv_dtype", "int4", "--kv-dtype=int4"),
        ("dtype", "float16", "--dtype=float16"),
        ("weights", "int8", "--weights=int8"),
        ("redundant_experts", -1, "--redundant-experts=-1 must be at least 0"),
        ("rebalance_every", -1, "--rebalance-every=-1 must be at least 0"),
        ("max_seq_len", -1, "--max-seq-len=-1 must be at least 0"),
        ("max_batch_tokens", 0, "--max-batch-tokens=0 must be at least 1"),
        ("max_running", 0, "--max-running=0 must be at least 1"),
        ("max_running", 3000, "--max-running=3000 needs as many --max-batch-tokens"),
    ],
)
def test_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_disk_cache": "1GiB"}, "--kv-disk-cache=1GiB is not DIR:BYTES"),
        ({"kv_disk_cache": ":1GiB"}, "--kv-disk-cache=:1GiB is not DIR:BYTES"),
        ({"kv_disk_cache": "dir:much"}, "--kv-disk-cache=much is not a size"),
        ({"kv_host_cache": "1GiB", "prefix_reuse": False}, "--no-prefix-reuse uses none"),
        ({"kv_disk_cache": "dir:1GiB", "prefix_reuse": False}, "--no-prefix-reuse uses none"),
    ],
)
def test_refused_tiers(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_tiers() -> None:
    assert EngineConfig().disk_cache is EngineConfig(kv_disk_cache="dir:0").disk_cache is None
    assert EngineConfig(kv_disk_cache="a:b:2KiB").disk_cache == (Path("a:b"), Size(2048))
    assert EngineConfig(kv_host_cache="0", kv_disk_cache="off", prefix_reuse=False)


def test_cache_form() -> None:
    forms = [EngineConfig(attn_impl=a).cache_form for a in ("naive", "absorb", "auto")]
    assert forms == ["heads", "latent", "latent"]


def test_copies_come_from_a_file_or_a_number() -> None:
    with pytest.raises(ConfigError, match="--redundant-experts=4: --expert-placement=file has its"):
        EngineConfig(expert_placement="file", redundant_experts=4)
