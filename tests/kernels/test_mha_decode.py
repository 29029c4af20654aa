import math
import sys

import pytest
import torch

from dsv3_kernels import mha_decode
from dsv3_kernels.testing import assert_close
from tests.kernels.definitions import attend

H, X, V = 3, 12, 7


def make(lengths: list[int]):
    """Keys and values in scattered slots of a cache whose other slots are NaN."""
    torch.manual_seed(0)
    kv = [torch.randn(n, H, X + V) for n in lengths]
    cache = torch.full((200, H * (X + V)), math.nan)
    cache[0] = 0.0
    free = (torch.randperm(199) + 1).tolist()
    slot = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    key_pos = torch.full((len(lengths), max(lengths)), 2**62)
    for b, n in enumerate(lengths):
        slot[b, :n], key_pos[b, :n] = torch.tensor([free.pop() for _ in range(n)]), torch.arange(n)
        cache[slot[b, :n]] = kv[b].flatten(1)
    return kv, (torch.randn(len(lengths), H, X), cache, slot, key_pos)


@pytest.mark.parametrize("ahead", [0, 2])
def test_mha_decode(ahead: int) -> None:
    """`ahead`: keys cached behind the query's own position, which it must not see."""
    lengths = [3, 64, 33]
    kv, args = make(lengths)
    query_pos = torch.tensor(lengths) - 1 - ahead
    got = mha_decode(*args, query_pos, 0.25)
    assert got.dtype == torch.float32
    for b, n in enumerate(lengths):
        for h in range(H):
            k, v = kv[b][: n - ahead, h].split([X, V], -1)
            want, _ = attend(args[0][b, h], k, v, 0.25)
            assert_close(f"{b} {h}", got[b, h], want, 1e-5)


def test_many_sequences_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 64, 33, 7, 1]
    _, args = make(lengths)
    query_pos = torch.tensor(lengths) - 1
    whole = mha_decode(*args, query_pos, 0.25)
    monkeypatch.setattr(
        sys.modules["dsv3_kernels.mha_decode"], "_SCORES", 2 * 64 * args[1].shape[1]
    )
    assert_close("two at a time", mha_decode(*args, query_pos, 0.25), whole, 1e-6)
