import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels import KeysValues, merge_lse, mla_prefill, mla_prefill_packed
from dsv3_kernels.attention._mla_prefill_kernel import Tile, launch_prefill
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.definitions import attend

Op = Callable[..., Any]  # an operation or one of its implementations

H, N, R, V = 3, 16, 8, 10
X = N + R


TILE = Tile(16, 16, 4, 1)


def by_kernel(
    q: Tensor, keys: KeysValues, first_key: int, first_query: int, scale: float
) -> tuple[Tensor, Tensor]:
    return launch_prefill(q, keys, None, len(q), first_query - first_key, scale, TILE)


def keys_of(k: Tensor, v: Tensor) -> KeysValues:
    """Keys as the op takes them."""
    return KeysValues(k[..., :N], k[..., N:], v)


both = pytest.mark.parametrize("mla_prefill", [mla_prefill.reference, by_kernel])


@both
@pytest.mark.parametrize(
    ("queries", "keys", "first_query", "first_key"),
    [
        (1, 1, 0, 0),
        (63, 63, 0, 0),  # a whole prompt
        (5, 64, 64, 0),  # earlier keys only
        (7, 7, 129, 129),  # a chunk to itself
        (6, 9, 100, 97),  # earlier keys and its own
        (6, 3, 100, 103),  # the first three queries see no key
        (4, 5, 0, 10),  # none does
    ],
)
def test_mla_prefill(
    mla_prefill: Op, queries: int, keys: int, first_query: int, first_key: int
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(queries, H, X), torch.randn(keys, H, X), torch.randn(keys, H, V)
    got_o, got_lse = mla_prefill(q, keys_of(k, v), first_key, first_query, 0.3)
    assert got_o.dtype == got_lse.dtype == torch.float32
    for i in range(queries):
        seen = min(max(first_query + i - first_key + 1, 0), keys)
        for h in range(H):
            o, lse = attend(q[i, h], k[:seen, h], v[:seen, h], 0.3)
            assert_close(f"o {i} {h}", got_o[i, h], o, 1e-5)
            assert_close(f"lse {i} {h}", got_lse[i, h], torch.tensor(lse), 1e-5)


@both
def test_it_is_scaled_dot_product_attention(mla_prefill: Op) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(129, H, X), torch.randn(129, H, X), torch.randn(129, H, V)
    want = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.2
    ).transpose(0, 1)
    assert_close("sdpa", mla_prefill(q, keys_of(k, v), 0, 0, 0.2)[0], want, 1e-5)


@both
def test_blocks_of_keys_merge_to_the_whole(mla_prefill: Op) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(20, H, X), torch.randn(70, H, X), torch.randn(70, H, V)
    want, want_lse = mla_prefill(q, keys_of(k, v), 0, 50, 0.3)
    merged = [mla_prefill(q, keys_of(k[a:b], v[a:b]), a, 50, 0.3) for a, b in ((0, 64), (64, 70))]
    o, lse = merge_lse(torch.stack([p[0] for p in merged]), torch.stack([p[1] for p in merged]))
    assert_close("o", o, want, 1e-5)
    assert_close("lse", lse, want_lse, 1e-6)


def test_long_prompts_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(40, H, X), torch.randn(40, H, X), torch.randn(40, H, V)
    whole = mla_prefill.reference(q, keys_of(k, v), 0, 0, 0.3)
    monkeypatch.setattr(sys.modules["dsv3_kernels.attention.mla_prefill"], "_SCORES", 7 * H * 40)
    for got, want in zip(mla_prefill.reference(q, keys_of(k, v), 0, 0, 0.3), whole, strict=True):
        assert_close("seven queries at a time", got, want, 1e-6)


def test_sequences_one_behind_the_other() -> None:
    """By the reference and the kernel, from strided views; the rotated keys are all heads' own."""
    torch.manual_seed(4)
    starts = [0, 1, 64, 64, 100]
    q, kv = torch.randn(100, H, X + 5)[..., :X], torch.randn(100, H, N + V)
    k_r = torch.randn(100, 1, R).expand(-1, H, -1)
    k_n, v = kv.split([N, V], -1)
    start_L = torch.tensor(starts, dtype=torch.int32)
    keys = KeysValues(k_n, k_r, v)
    got = mla_prefill_packed(q, keys, start_L, 63, 0.3)
    kernel = launch_prefill(q, keys, start_L, 63, 0, 0.3, TILE)
    for a, b in pairwise(starts):
        one = mla_prefill.reference(q[a:b], keys.rows(a, b), 0, 0, 0.3)
        alone = by_kernel(q[a:b], keys.rows(a, b), 0, 0, 0.3)
        if b == a:
            continue
        for i in range(2):
            assert_close("reference", got[i][a:b], one[i], 1e-6)
            assert_close("kernel", kernel[i][a:b], one[i], 2e-6)
            assert_bitwise_equal("alone", kernel[i][a:b], alone[i])


def test_kernel_at_published_dims() -> None:
    torch.manual_seed(5)
    q, k_n, v = torch.randn(40, 1, 192), torch.randn(70, 1, 128), torch.randn(70, 1, 128)
    args = q, KeysValues(k_n, torch.randn(70, 1, 64), v), 0, 30, 0.07
    for got, want in zip(mla_prefill.kernel(*args), mla_prefill.reference(*args), strict=True):
        assert_close("published", got, want, 2e-6)
