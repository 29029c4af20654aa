"""Index keys as they are written, and index queries: against the definition and the reference."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels import Rotation
from dsv3_kernels.fp8_format import FP8
from dsv3_kernels.index.index_cache import IndexCache, hadamard, quantize_index
from dsv3_kernels.index.index_key import IndexWrite, write_index_keys
from dsv3_kernels.index.index_query import index_queries
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.index_pages import FORMS, empty_cache

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
OPS = pytest.mark.parametrize("op", ["reference", "kernel"])
DIMS = pytest.mark.parametrize(("dim", "rotated"), [(32, 16), (64, 64), (128, 64), (128, 2)])
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True])


def rotation_of(tokens: int, rotated: int, interleaved: bool) -> Rotation:
    angle = torch.rand(tokens, rotated // 2) * 50
    return Rotation(angle.cos(), angle.sin(), interleaved)


def turned(x_I: Tensor, rotation: Rotation, token: int) -> Tensor:
    """Rotate a vector pair by pair, in float64."""
    x, out = x_I.double(), x_I.double().clone()
    half = rotation.cos_Tr.shape[1]
    for r in range(half):
        a, b = (2 * r, 2 * r + 1) if rotation.interleaved else (r, r + half)
        cos, sin = float(rotation.cos_Tr[token, r]), float(rotation.sin_Tr[token, r])
        out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


def hadamard_matrix(dim: int) -> Tensor:
    rows = torch.arange(dim)
    shared = rows[:, None] & rows
    ones = sum((shared >> bit) & 1 for bit in range(dim.bit_length()))
    return (1 - 2 * (torch.as_tensor(ones) % 2)).double() / math.sqrt(dim)


def make_write(
    dim: int, rotated: int, interleaved: bool, form: torch.dtype, dtype: torch.dtype
) -> IndexWrite:
    """Return nine tokens, of which two are of other ranks, for pages of four slots."""
    torch.manual_seed(dim)
    return IndexWrite(
        key_TI=(torch.randn(9, dim + 5) * 3 + 1).to(dtype)[:, 3 : dim + 3],
        weight_I=torch.rand(dim) + 0.5,
        bias_I=torch.randn(dim),
        rotation=rotation_of(9, rotated, interleaved),
        cache=empty_cache(6, dim, form, 4),
        slot_T=torch.tensor([3, 9, -1, 23, 17, 5, 0, -1, 10]),
    )


@pytest.mark.parametrize("dim", [2, 32, 64, 128])
def test_hadamard(dim: int) -> None:
    x = torch.randn(3, dim)
    want = x.double() @ hadamard_matrix(dim)
    assert_close("rotated", hadamard(x), want, 1e-6)
    assert_close("twice", hadamard(hadamard(x)), x, 1e-6)
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="12 values, no power of two"):
        hadamard(torch.randn(3, 12))


def test_scales_are_powers_of_two() -> None:
    """Large and tiny vectors; one whose largest value just exceeds 448 times a power of two."""
    x = torch.randn(40, 128) * torch.logspace(-6, 6, 40)[:, None]
    quantized, scale = quantize_index(x)
    assert quantized.dtype == FP8 and bool((torch.frexp(scale).mantissa == 0.5).all())
    rotated = hadamard(x)
    amax = rotated.abs().amax(1).clamp_min(1e-4)
    assert bool((scale >= amax / 448).all()) and bool((scale < amax / 224 * 1.0001).all())
    error = (quantized.float() * scale[:, None] - rotated).abs().amax(1)
    assert bool((error <= 16 * scale).all()), "half a step of the largest values"


@OPS
@INTERLEAVED
@DIMS
@pytest.mark.parametrize("form", FORMS)
def test_write_index_keys(
    form: torch.dtype, dim: int, rotated: int, interleaved: bool, op: str
) -> None:
    write = make_write(dim, rotated, interleaved, form, torch.float32)
    before = write.cache.slots.clone()
    getattr(write_index_keys, op)(write)
    is_fp8 = form == torch.uint8
    for t, slot in enumerate(write.slot_T.tolist()):
        if slot < 0:
            continue
        x = F.layer_norm(
            write.key_TI[t].double(),
            (dim,),
            write.weight_I.double(),
            write.bias_I.double(),
            1e-6,
        )
        x = turned(x, write.rotation, t)
        want = x @ hadamard_matrix(dim) if is_fp8 else x
        got = write.cache.read(torch.tensor([slot]))[0]
        tolerance = 2**-4 if is_fp8 else TOLERANCE.get(form, 0.0)
        assert_close(f"token {t}", got, want, tolerance)
    unwritten = torch.ones(24, dtype=torch.bool)
    unwritten[write.slot_T[write.slot_T >= 0]] = False
    if is_fp8:
        after = IndexCache(before, 4).views()
        for name, got, old in zip(("values", "scales"), write.cache.views(), after, strict=True):
            assert_bitwise_equal(name, got.flatten(0, 1)[unwritten], old.flatten(0, 1)[unwritten])
    else:
        assert_bitwise_equal("others", write.cache.slots[unwritten], before[unwritten])


@INTERLEAVED
@DIMS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_writes_keys_as_the_reference(
    dtype: torch.dtype, form: torch.dtype, dim: int, rotated: int, interleaved: bool
) -> None:
    write = make_write(dim, rotated, interleaved, form, dtype)
    other = replace(write, cache=IndexCache(write.cache.slots.clone(), 4))
    write_index_keys.kernel(write)
    write_index_keys.reference(other)
    got, want = (each.cache.read(torch.arange(24)) for each in (write, other))
    if dtype == torch.float32 and form == torch.uint8:
        assert_bitwise_equal("pages", write.cache.slots, other.cache.slots)
        return
    # The interpreter cuts bfloat16: a last place of it, and a step of e4m3 at the largest values.
    tolerance = max(TOLERANCE[dtype], 2**-3 if form == torch.uint8 else TOLERANCE[form])
    assert_close("keys", got, want, tolerance)


@OPS
@INTERLEAVED
@DIMS
@pytest.mark.parametrize("heads", [4, 20, 64])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_index_queries(
    is_fp8: bool, heads: int, dim: int, rotated: int, interleaved: bool, op: str
) -> None:
    torch.manual_seed(heads)
    q = torch.randn(3, heads + 1, dim + 4)[:, 1:, 2 : dim + 2]
    parts, rotation = torch.randn(16, 3, heads), rotation_of(3, rotated, interleaved)
    run: Callable[..., tuple[Tensor, Tensor]] = getattr(index_queries, op)
    got, weight = run(q, parts, rotation, is_fp8)
    scale = torch.ones(3, heads)
    assert got.dtype == (FP8 if is_fp8 else torch.float32) and weight.dtype == torch.float32
    want = torch.stack([torch.stack([turned(x, rotation, t) for x in q[t]]) for t in range(3)])
    if is_fp8:
        want = want @ hadamard_matrix(dim)
        largest = want.abs().amax(-1) / 448
        scale = torch.exp2(largest.log2().ceil()).float()
    assert_close("queries", got.float() * scale[..., None], want, 2**-4 if is_fp8 else 1e-6)
    want_weight = parts.double().sum(0) / math.sqrt(heads * dim) * scale
    assert_close("weights", weight, want_weight, 1e-6)


@DIMS
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_computes_queries_as_the_reference(
    dtype: torch.dtype, is_fp8: bool, dim: int, rotated: int
) -> None:
    q, parts = torch.randn(5, 20, dim).to(dtype), torch.randn(1, 5, 20)
    args = q, parts, rotation_of(5, rotated, False), is_fp8
    (got, weight), (want, want_weight) = index_queries.kernel(*args), index_queries.reference(*args)
    if dtype == torch.float32:
        assert_bitwise_equal("queries", got.view(torch.uint8), want.view(torch.uint8))
        assert_close("weights", weight, want_weight, 1e-6)
        return
    # The interpreter cuts bfloat16, so a scale may be the next power of two.
    is_same = (weight / want_weight - 1).abs() < 2**-7
    assert float(is_same.float().mean()) > 0.9
    assert_close("queries", got.float()[is_same], want.float()[is_same], 2**-3)


def test_no_tokens() -> None:
    write = make_write(32, 16, False, torch.uint8, torch.float32)
    rotation = write.rotation.tokens(0, 0)
    none = replace(write, key_TI=write.key_TI[:0], rotation=rotation, slot_T=write.slot_T[:0])
    write_index_keys.kernel(none)
    q, weight = index_queries.kernel(torch.empty(0, 4, 32), torch.empty(1, 0, 4), rotation, True)
    assert q.shape == (0, 4, 32) and weight.shape == (0, 4)
