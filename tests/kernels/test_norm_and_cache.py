from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_kernels import EntryWrite, Rotation, packed_bytes, rmsnorm
from dsv3_kernels.attention.norm_and_cache import norm_and_cache
from dsv3_kernels.attention.rope_and_cache import rope_and_cache
from dsv3_kernels.ops.rmsnorm import add_rmsnorm
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

Op = Callable[..., Any]  # an operation or one of its implementations

APART = {
    norm_and_cache.reference: (add_rmsnorm.reference, rope_and_cache.reference),
    norm_and_cache.kernel: (add_rmsnorm.kernel, rope_and_cache.kernel),
}


@pytest.mark.parametrize("op", APART)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["wide", "packed", "none kept"])
@pytest.mark.parametrize(("tokens", "A", "C", "R"), [(1, 1536, 512, 64), (5, 24, 192, 12)])
def test_the_bits_of_two_launches(
    op: Op, dtype: torch.dtype, form: str, tokens: int, A: int, C: int, R: int
) -> None:
    torch.manual_seed(0)
    wide = torch.randn(tokens, A + 4 + C + R).to(dtype)
    x = wide[:, :A]
    kv = wide[:, A + 4 :]
    angle = torch.rand(tokens, R // 2) * 50
    weight, quant = torch.rand(A) + 0.5, A % 128 == 0
    rotation = Rotation(angle.cos(), angle.sin(), form != "packed")
    entry = kv, torch.rand(C) + 0.5, 1e-6, rotation
    slot = torch.tensor([4, -1, 0, 3, 6])[:tokens]
    cache = torch.full((9, C + R), 5.0)
    if form == "packed":
        cache = torch.full((9, packed_bytes(C, R)), 9, dtype=torch.uint8)
    keep = tokens if form == "none kept" else tokens // 2
    norm, store = APART[op]
    for ue8m0 in (False, True):
        caches = [cache.clone() for _ in range(2)]
        write = EntryWrite(*entry, caches[0], slot, keep)
        h, q, kept = op(x, weight, quant, ue8m0, write)
        _, want_h, want_q = norm(x, None, weight, 1e-6, quant, ue8m0)
        assert_bitwise_equal("norm", h, want_h)
        assert_close("norm", h, rmsnorm(x, weight, 1e-6), 1e-6 if dtype == torch.float32 else 2**-6)
        assert (q is not None) == quant
        for got, want in zip(q or (), want_q or (), strict=True):
            assert_bitwise_equal("in FP8", got, want)
        assert_bitwise_equal("kept", kept, store(EntryWrite(*entry, caches[1], slot, keep)))
        assert_bitwise_equal("cache", *caches)
        assert not torch.equal(caches[0], cache)


def test_no_tokens() -> None:
    wide, none = torch.zeros(0, 200), torch.zeros(0, 4)
    write = EntryWrite(
        kv_TX=wide[:, 128:],
        weight_C=torch.ones(64),
        eps=1e-6,
        rotation=Rotation(none, none, True),
        cache_SX=torch.zeros(3, 72),
        slot_T=none,
        keep_from=0,
    )
    h, q, kept = norm_and_cache.kernel(wide[:, :128], torch.ones(128), True, False, write)
    assert q is not None and h.shape == q.q.shape == (0, 128) and kept.shape == (0, 72)
