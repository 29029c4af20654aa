import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_kernels import act_quant, empty_parts, expand_values, open_parts
from dsv3_kernels.attention.merge_lse import merge_lse
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

both = pytest.mark.parametrize("expand", [expand_values.reference, expand_values.kernel])

Op = Callable[..., Any]  # an operation or one of its implementations


def operands(
    P: int, T: int, H: int, C: int, V: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts as ranks send them, some without a key, some rows without any; W_UV."""
    torch.manual_seed(0)
    z, lse = open_parts(empty_parts(torch.empty(P, T, H, 1, dtype=dtype), C))
    z.copy_(torch.randn(z.shape))
    lse.copy_(torch.randn(lse.shape) * 10)
    lse[torch.rand(lse.shape) < 0.3] = -math.inf
    lse[:, -1:] = -math.inf
    z[lse == -math.inf] = 0
    w = torch.randn(H, V + 3, C).to(dtype)[:, 3:] / C**0.5
    return z, lse, w


@both
def test_definition(expand: Op) -> None:
    z, lse, w = operands(3, 4, 2, 16, 8)
    got, quantized = expand(z, lse, w)
    assert got.shape == (4, 16) and quantized is None
    merged = merge_lse.reference(z, lse)[0].double()
    for h in range(2):
        assert_close("values", got[:, 8 * h : 8 * h + 8], merged[:, h] @ w[h].double().T, 1e-5)
    assert bool((got[-1] == 0).all()), "a row without any key"


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 512, 128), (2, 17, 2, 72, 24), (8, 0, 2, 16, 16), (5, 33, 1, 100, 65)]
)
def test_kernel(shape: tuple[int, int, int, int, int]) -> None:
    args = operands(*shape)
    got, want = expand_values.kernel(*args)[0], expand_values.reference(*args)[0]
    assert got.shape == want.shape
    if got.numel():
        assert_close("values", got, want, 1e-5)


@both
def test_one_part_needs_no_weight(expand: Op) -> None:
    z, lse, w = operands(1, 5, 2, 32, 16)
    lse[:], z[:] = 3.0, torch.randn(z.shape)
    want = expand_values.reference(z, lse, w)[0]
    assert_close("values", expand(z, None, w)[0], want, 1e-6)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("values", [128, 256])
def test_quantized_in_the_same_launch(values: int, ue8m0: bool) -> None:
    args = operands(2, 19, 3, 64, values)
    o, quantized = expand_values.kernel(*args, True, ue8m0)
    assert quantized is not None
    for name, got, want in zip(("q", "scale"), quantized, act_quant(o, ue8m0), strict=True):
        assert_bitwise_equal(name, got, want)


def test_values_that_are_no_blocks_are_quantized_all_the_same() -> None:
    z, lse, w = operands(2, 3, 4, 16, 32)
    o, quantized = expand_values(z, lse, w, quant=True)
    assert quantized is not None and quantized.q.shape == o.shape == (3, 128)


def test_bfloat16() -> None:
    args = operands(4, 20, 2, 128, 128, torch.bfloat16)
    got = expand_values.kernel(*args)[0]
    assert got.dtype == torch.bfloat16
    assert_close("values", got.float(), expand_values.reference(*args)[0].float(), 2e-2)


def test_a_token_does_not_depend_on_the_others() -> None:
    z, lse, w = operands(2, 40, 2, 64, 128)
    whole = expand_values.kernel(z, lse, w)[0]
    for t in (0, 17, 39):
        one = slice(t, t + 1)
        alone = expand_values.kernel(z[:, one], lse[:, one], w)[0]
        assert_bitwise_equal("alone", alone, whole[one])


def test_parts_whose_offsets_take_more_than_32_bits() -> None:
    """Only the pages of memory that hold them are touched; an offset that wraps around reads 0."""
    C, far = 16, 2**31
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python has from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (2 * far + C), flags=flags)
    every = torch.frombuffer(memory, dtype=torch.bfloat16)[far:]
    z = every.as_strided((3, 1, 1, C), (far // 2, C, C, 1))
    _, lse, w = operands(3, 1, 1, C, 16)
    z.copy_(torch.randn(z.shape))
    lse[:] = torch.randn(3, 1, 1)
    got = expand_values.kernel(z, lse, w)[0]
    assert_close("values", got, expand_values.reference(z, lse, w)[0], 1e-5)
