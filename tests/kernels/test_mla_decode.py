import math
import sys

import pytest
import torch

from dsv3_kernels import merge_lse, mla_decode
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.definitions import attend

H, C, R = 3, 16, 8
PADDING = 2**62


def make(lengths: list[int], queries: int, shards: int = 1, shard: int = 0):
    """Sequences in scattered slots of a cache whose other slots are NaN; slot 0 pads rows."""
    torch.manual_seed(0)
    keys = [torch.randn(n, C + R) for n in lengths]
    q = torch.randn(len(lengths), queries, H, C + R)
    cache = torch.full((200, C + R), math.nan)
    cache[0] = 0.0
    free = (torch.randperm(199) + 1).tolist()
    held = [list(range(shard, n, shards)) for n in lengths]
    width = max(1, *map(len, held))
    slot = torch.zeros(len(lengths), width, dtype=torch.int64)
    key_pos = torch.full((len(lengths), width), PADDING)
    for b, positions in enumerate(held):
        for j, p in enumerate(positions):
            slot[b, j], key_pos[b, j] = free.pop(), p
            cache[slot[b, j]] = keys[b][p]
    query_pos = torch.tensor([[n - queries + i for i in range(queries)] for n in lengths])
    return keys, q, cache, slot, key_pos, query_pos


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_mla_decode(queries: int) -> None:
    lengths = [5, 64, 33]
    keys, q, cache, slot, key_pos, query_pos = make(lengths, queries)
    o, lse = mla_decode(q, cache, slot, key_pos, query_pos, C, 0.25)
    assert o.dtype == lse.dtype == torch.float32 and o.shape == (3, queries, H, C)
    for b in range(len(lengths)):
        for i in range(queries):
            seen = keys[b][: int(query_pos[b, i]) + 1]
            for h in range(H):
                want_o, want_lse = attend(q[b, i, h], seen, seen[:, :C], 0.25)
                assert_close(f"o {b} {i} {h}", o[b, i, h], want_o, 1e-5)
                assert_close(f"lse {b} {i} {h}", lse[b, i, h], torch.tensor(want_lse), 1e-5)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_shards_merge_to_the_whole(shards: int) -> None:
    """Sequences shorter than the number of shards leave some without a key."""
    lengths = [1, 3, 40]
    _, *args = make(lengths, 1)
    whole_o, whole_lse = mla_decode(*args, C, 0.25)
    parts = []
    for shard in range(shards):
        _, *args = make(lengths, 1, shards, shard)
        o, lse = mla_decode(*args, C, 0.25)
        empty = torch.tensor([n <= shard for n in lengths])
        assert bool((lse[empty] == -math.inf).all()) and bool((o[empty] == 0).all())
        assert bool(lse[~empty].isfinite().all())
        parts.append((o.flatten(0, 1), lse.flatten(0, 1)))
    o, lse = merge_lse(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    assert_close("o", o, whole_o.flatten(0, 1), 1e-5)
    assert_close("lse", lse, whole_lse.flatten(0, 1), 1e-6)


def test_keys_in_any_order() -> None:
    _, q, cache, slot, key_pos, query_pos = make([17, 17], 2)
    want, _ = mla_decode(q, cache, slot, key_pos, query_pos, C, 0.25)
    order = torch.randperm(17)
    got, _ = mla_decode(q, cache, slot[:, order], key_pos[:, order], query_pos, C, 0.25)
    assert_close("shuffled", got, want, 1e-5)


def test_many_sequences_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    _, *args = make([5, 64, 33, 7, 1], 1)
    whole = mla_decode(*args, C, 0.25)
    monkeypatch.setattr(sys.modules["dsv3_kernels.mla_decode"], "_SCORES", 64 * (C + R) * 2)
    for got, want in zip(mla_decode(*args, C, 0.25), whole, strict=True):
        assert_bitwise_equal("two sequences at a time", got, want)
