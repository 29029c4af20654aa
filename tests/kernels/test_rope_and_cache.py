from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsv3_kernels import (
    EntryWrite,
    Rotation,
    apply_rope,
    pack_latent,
    packed_bytes,
    rmsnorm,
    unpack_latent,
)
from dsv3_kernels.attention.rope_and_cache import rope_and_cache
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

both = pytest.mark.parametrize("op", [rope_and_cache.reference, rope_and_cache.kernel])
EPS = 1e-6


class Projections(NamedTuple):
    """Projections of latents and keys, the norm's weight, and the rotations of the tokens."""

    kv: Tensor
    weight: Tensor
    cos: Tensor
    sin: Tensor


Op = Callable[..., Any]  # an operation or one of its implementations


def make(T: int, C: int, R: int) -> Projections:
    """Return the projections, as parts of wider rows, and the kernel's other arguments."""
    torch.manual_seed(0)
    kv = torch.randn(T, 7 + C + R)[:, 7:] * 3
    angle = torch.rand(T, R // 2) * 50
    return Projections(kv, torch.rand(C) + 0.5, angle.cos(), angle.sin())


def store(
    args: Projections,
    interleaved: bool,
    cache: Tensor,
    slot_T: Tensor,
    keep_from: int,
    op: Op = rope_and_cache.kernel,
) -> Tensor:
    rotation = Rotation(args.cos, args.sin, interleaved)
    return op(EntryWrite(args.kv, args.weight, EPS, rotation, cache, slot_T, keep_from))


def entries(args: Projections, interleaved: bool) -> Tensor:
    C = len(args.weight)
    rotated = apply_rope(args.kv[:, C:], Rotation(args.cos, args.sin, interleaved))
    return torch.cat((rmsnorm(args.kv[:, :C], args.weight, EPS), rotated), -1)


@both
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("C", "R"), [(512, 64), (24, 12), (192, 8)])
@pytest.mark.parametrize("slots", [[2], [4, -1, 0, 3, -1, 7]])
def test_float32(op: Op, interleaved: bool, C: int, R: int, slots: list[int]) -> None:
    args = make(len(slots), C, R)
    want = entries(args, interleaved)
    cache = torch.full((9, C + R), 5.0)
    keep = len(slots) // 2
    kept = store(args, interleaved, cache, torch.tensor(slots), keep, op)
    assert_close("kept", kept, want[keep:], 1e-6)
    for t, slot in enumerate(slots):
        if slot >= 0:
            assert_close(f"slot {slot}", cache[slot], want[t], 1e-6)
    others = [s for s in range(9) if s not in slots]
    assert bool((cache[others] == 5.0).all())


@both
@pytest.mark.parametrize(("C", "R"), [(512, 64), (192, 8), (24, 12)])
def test_packed(op: Op, C: int, R: int) -> None:
    slots = [4, -1, 0]
    args = make(3, C, R)
    want = entries(args, True)
    cache = torch.full((6, packed_bytes(C, R)), 9, dtype=torch.uint8)
    kept = store(args, True, cache, torch.tensor(slots), 0, op)
    assert bool((cache[[1, 2, 3, 5]] == 9).all())
    for t in range(3):
        # Half a last place of e4m3 is a 16th, of bfloat16 (which the interpreter cuts) a 128th.
        latent_error = (kept[t, :C] - want[t, :C]).abs()
        assert bool((latent_error <= want[t, :C].abs() / 15 + 1e-2).all())
        assert_close("rope", kept[t, C:], want[t, C:], 2**-7)
    for t, slot in ((0, 4), (2, 0)):
        assert_bitwise_equal("kept", kept[t], unpack_latent(cache[slot], C, torch.float32))
        exact = pack_latent(want[t], C)
        blocks = slice(C, C + 4 * -(-C // 128))
        got_scale, want_scale = (x[blocks].view(torch.float32) for x in (cache[slot], exact))
        assert_close("scale", got_scale, want_scale, 1e-6)
        # A quotient on the border of two codes may fall to either side.
        codes = (cache[slot, :C].int() - exact[:C].int()).abs()
        assert int(codes.max()) <= 1 and float((codes > 0).float().mean()) < 0.02


@both
def test_rounded_to_the_storage_format(op: Op) -> None:
    args = make(4, 64, 16)
    cache = torch.zeros(4, 80, dtype=torch.float16)
    kept = store(args, True, cache, torch.arange(4), 2, op)
    assert_close("stored", cache, entries(args, True), 1e-3)
    assert_bitwise_equal("kept", kept, cache[2:].float())


@both
def test_nothing_is_kept(op: Op) -> None:
    args = make(3, 64, 16)
    assert store(args, True, torch.zeros(4, 80), torch.arange(3), 3, op).shape == (0, 80)


def test_tokens_do_not_see_each_other() -> None:
    args = make(5, 64, 16)
    kept = store(args, True, torch.zeros(9, 80), torch.arange(5), 0)
    alone = Projections(args.kv[3:4], args.weight, args.cos[3:4], args.sin[3:4])
    got = store(alone, True, torch.zeros(9, 80), torch.tensor([7]), 0)
    assert_bitwise_equal("one", got, kept[3:4])
