import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.errors import ConfigError
from dsv3.settings import EngineConfig
from dsv3.sizes import CacheSize, Size


def with_value(field: str, value: object) -> EngineConfig:
    settings: dict[str, Any] = {field: value}
    return EngineConfig(**settings)


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
    assert CacheSize.parse("size", text) == size


WRONG = ("", "-1", "1.5", "tok", "all", "4GX", "4iB", "1e9", "1,000", "101%", "-5%", "4G 2M", "G")


@pytest.mark.parametrize("text", [*WRONG, "0", "0tok", "0%", "0G", "1.5tok", "off"])
def test_wrong_cache_size(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineConfig(kv_cache_size=text)
    for form in (f"kv_cache_size={text} is", "auto", "4GiB", "1.5G", "90%", "65536tok"):
        assert form in str(refused.value)


@pytest.mark.parametrize("text", [*WRONG, "64tok", "auto"])
def test_wrong_sizes_of_other_caches(text: str) -> None:
    for field, value in (("kv_host_cache", text), ("kv_disk_cache", f"dir:{text}")):
        error = f"{field}={text} is not a size; use bytes"
        with pytest.raises(ConfigError, match=re.escape(error)):
            with_value(field, value)


def test_a_share_refers_to_the_available_bytes() -> None:
    assert Size(share=0.25).of(1000) == 250
    assert Size(num_bytes=7).of(1000) == 7
    assert EngineConfig(kv_host_cache="25%").host_cache == Size(share=0.25)
    assert EngineConfig(kv_disk_cache="dir:5%").disk_cache == (Path("dir"), Size(share=0.05))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attn_impl", "flash", "attn_impl=flash is unknown; use one of auto, naive, absorb"),
        ("kv_shard", "heads", "kv_shard=heads is unknown; use one of tokens, none"),
        ("kv_dtype", "int4", "kv_dtype=int4"),
        ("dtype", "float16", "dtype=float16"),
        ("weights", "int2", "weights=int2"),
        ("redundant_experts", -1, "redundant_experts=-1 must be at least 0"),
        ("rebalance_every", -1, "rebalance_every=-1 must be at least 0"),
        ("max_seq_len", -1, "max_seq_len=-1 must be at least 0"),
        ("max_batch_tokens", 0, "max_batch_tokens=0 must be at least 1"),
        ("max_running", 0, "max_running=0 must be at least 1"),
        ("max_running", 3000, "max_running=3000 needs as many max_batch_tokens"),
    ],
)
def test_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_value(field, value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_disk_cache": "1GiB"}, "kv_disk_cache=1GiB is not DIR:BYTES"),
        ({"kv_disk_cache": ":1GiB"}, "kv_disk_cache=:1GiB is not DIR:BYTES"),
        ({"kv_disk_cache": "dir:much"}, "kv_disk_cache=much is not a size"),
        ({"kv_host_cache": "1GiB", "prefix_reuse": False}, "prefix_reuse=False uses none"),
        ({"kv_disk_cache": "dir:1GiB", "prefix_reuse": False}, "prefix_reuse=False uses none"),
    ],
)
def test_refused_tiers(settings: dict[str, Any], message: str) -> None:
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
    with pytest.raises(ConfigError, match="redundant_experts=4: expert_placement=file has its"):
        EngineConfig(expert_placement="file", redundant_experts=4)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"max_seq_len": np.int64(512)}, {"max_seq_len": 512}),
        ({"max_seq_len": 512.0, "max_running": "8"}, {"max_seq_len": 512, "max_running": 8}),
        ({"max_seq_len": None, "prefix_reuse": None}, {"max_seq_len": 0, "prefix_reuse": True}),
        ({"kv_cache_size": 2**31, "kv_host_cache": 0}, {"kv_cache_size": "2147483648"}),
        ({"kv_disk_cache": None, "expert_placement": Path("f")}, {"expert_placement": "f"}),
        ({"prefix_reuse": np.False_}, {"prefix_reuse": False}),
    ],
)
def test_values_are_read_as_the_type_of_their_field(
    given: dict[str, Any], taken: dict[str, Any]
) -> None:
    config = EngineConfig(**given)
    for name, value in taken.items():
        got = getattr(config, name)
        assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_seq_len", "8k", "max_seq_len='8k' must be a whole number, at least 0"),
        ("max_seq_len", 512.5, "max_seq_len=512.5 must be a whole number, at least 0"),
        ("max_running", True, "max_running=True must be a whole number, at least 1"),
        ("max_running", [8], "max_running=[8] must be a whole number, at least 1"),
        ("prefix_reuse", "no", "prefix_reuse='no' must be True or False"),
        ("enforce_eager", 1, "enforce_eager=1 must be True or False"),
        ("kv_cache_size", 1.5, "kv_cache_size=1.5 must be a text"),
        ("kv_host_cache", False, "kv_host_cache=False must be a text"),
        ("dtype", b"fp8", "dtype=b'fp8' must be a text: one of auto, float32, bfloat16, fp8, int8"),
        ("eviction", ["lru"], "eviction=['lru'] must be a text: one of cost, lru"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(name: str, value: object, error: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_value(name, value)
    assert str(refused.value) == error
