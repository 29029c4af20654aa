import sys

import pytest
import torch
from torch.nn import functional as F

from dsv3_kernels import merge_lse, mla_prefill
from dsv3_kernels.testing import assert_close
from tests.kernels.definitions import attend

H, X, V = 3, 24, 10


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
def test_mla_prefill(queries: int, keys: int, first_query: int, first_key: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(queries, H, X), torch.randn(keys, H, X), torch.randn(keys, H, V)
    got_o, got_lse = mla_prefill(q, k, v, first_key, first_query, 0.3)
    assert got_o.dtype == got_lse.dtype == torch.float32
    for i in range(queries):
        seen = min(max(first_query + i - first_key + 1, 0), keys)
        for h in range(H):
            o, lse = attend(q[i, h], k[:seen, h], v[:seen, h], 0.3)
            assert_close(f"o {i} {h}", got_o[i, h], o, 1e-5)
            assert_close(f"lse {i} {h}", got_lse[i, h], torch.tensor(lse), 1e-5)


def test_it_is_scaled_dot_product_attention() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(129, H, X), torch.randn(129, H, X), torch.randn(129, H, V)
    want = F.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=0.2
    ).transpose(0, 1)
    assert_close("sdpa", mla_prefill(q, k, v, 0, 0, 0.2)[0], want, 1e-5)


def test_blocks_of_keys_merge_to_the_whole() -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(20, H, X), torch.randn(70, H, X), torch.randn(70, H, V)
    want, want_lse = mla_prefill(q, k, v, 0, 50, 0.3)
    parts = [mla_prefill(q, k[a:b], v[a:b], a, 50, 0.3) for a, b in ((0, 64), (64, 70))]
    o, lse = merge_lse(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    assert_close("o", o, want, 1e-5)
    assert_close("lse", lse, want_lse, 1e-6)


def test_long_prompts_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(40, H, X), torch.randn(40, H, X), torch.randn(40, H, V)
    whole = mla_prefill(q, k, v, 0, 0, 0.3)
    monkeypatch.setattr(sys.modules["dsv3_kernels.mla_prefill"], "_SCORES", 7 * H * 40)
    for got, want in zip(mla_prefill(q, k, v, 0, 0, 0.3), whole, strict=True):
        assert_close("seven queries at a time", got, want, 1e-6)
