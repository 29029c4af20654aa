"""Products of rows with the matrices of their experts, for `grouped_gate_up` and `grouped_down`.

Rows are sorted by expert (`permute.Groups`). Programs of a persistent grid compute the tiles that
follow from the counts on the device: experts without rows cost nothing, and the host needs no
counts. For few rows operands are swapped (a tile is W x^T): matrix units need at least 64 rows of
the first operand and 16 of the second. Tiles of many rows are x W^T, with W loaded through TMA if
available. In either case an element is the same chain of sums of 128 bytes along D, so a row's
result does not depend on other rows. (Swapped and unswapped chains give the same bits if matrix
units treat both operands alike; `tests/kernels/test_gpu_experts.py` asserts it on a GPU.)

The numbers are float (one dtype, float32 sums; float32 without TF32), float rows with FP8 matrices
(dequantized in registers, as by `weight_dequant`), FP8 rows quantized 1x128 with FP8 matrices
(partial sums of 128, scaled and added in float32), float rows with matrices of int8 or int4
(`gemm/_int_product.py`; W x^T for any number of rows), and int8 rows with int8 matrices that have a
scale per row (summed in int32).

Bound by reading the matrices of experts with rows, up to about 64 rows per expert, then by matrix
units.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import has_tma, is_interpreted, launch_gpu
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm._int_product import step_of
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.gemm.bf16_gemm import linear
from dsv3_kernels.gemm.int_gemm import int_linear
from dsv3_kernels.gemm.integers import Integers
from dsv3_kernels.gemm.weight_dequant import weight_dequant
from dsv3_kernels.moe.permute import Groups


@dataclass(frozen=True, slots=True)
class Stack:
    """The matrices of the local experts.

    Attributes:
        weight: [E, N, D], float or float8_e4m3fn; of integers, as `Integers.q`.
        block_scale: [E, ceil(N / 128), ceil(D / 128)] float32 if the matrices are FP8; of integers,
            [E, N, groups], as `Integers.scale`; else None.
        group: columns that share a scale of integers; 0 for other matrices.
        zero: [E, N, groups], as `Integers.zero`.
        multiplier: implements `multiply` for the references, with matrices in any form. By default
            the matrices above are multiplied.
    """

    weight: Tensor
    block_scale: Tensor | None = None
    group: int = 0
    zero: Tensor | None = None
    multiplier: Callable[[int, Tensor, Tensor], None] | None = None

    @property
    def num_features(self) -> int:
        """Features N of a product."""
        return self.weight.shape[1]

    def integers(self, e: int) -> Integers:
        """Return matrix `e` of a stack of integers."""
        assert self.block_scale is not None
        zero = None if self.zero is None else self.zero[e]
        return Integers(self.weight[e], self.block_scale[e], self.group, zero)

    def multiply(self, e: int, x: Tensor, out: Tensor) -> None:
        """Write x W_e^T to `out`, of any float dtype."""
        if self.multiplier is not None:
            self.multiplier(e, x, out)
        elif self.group:
            out.copy_(int_linear(x, self.integers(e)))
        else:
            out.copy_(linear(x, self.matrix(e, x.dtype)))

    def product(self, e: int, x: Tensor) -> Tensor:
        """Return x W_e^T in the dtype of `x`."""
        out = x.new_empty((len(x), self.num_features))
        self.multiply(e, x, out)
        return out

    def matrix(self, e: int, dtype: torch.dtype) -> Tensor:
        """Return matrix `e`, [N, D], dequantized to `dtype` if it is FP8."""
        if self.block_scale is None:
            return self.weight[e]
        return weight_dequant(self.weight[e], self.block_scale[e], dtype)


def products(x: Tensor, w: Stack, groups: Groups) -> Iterator[tuple[slice, Tensor]]:
    """Yield, for every expert with rows, its rows and their product with its matrix."""
    starts, counts = groups.start_E.tolist(), groups.count_E.tolist()
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            rows = slice(start, start + count)
            yield rows, w.product(e, x[rows])


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the products.

    Attributes:
        rows: sorted entries.
        features: columns of the result (of gate, and as many of up).
        warps, stages: of the launch.
        per_sm: programs per multiprocessor.
    """

    rows: int
    features: int
    warps: int
    stages: int
    per_sm: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """The types of the numbers in a product.

    Attributes:
        itemsize: bytes of an element of the rows.
        fp8: the matrices are FP8.
        bits: 4 or 8 if the matrices are integers, else 0.
        quantized: the rows are quantized like the matrices, to FP8 or int8; else they are float.
        native: Triton has e4m3 on the GPU; else FP8 is passed as bytes.
    """

    itemsize: int
    fp8: bool
    bits: int
    quantized: bool
    native: bool

    @property
    def dequantizes_integers(self) -> bool:
        """True if matrices of integers are multiplied by float rows (`multiply_integers`)."""
        return self.bits > 0 and not self.quantized


@cache
def _tile(numbers: Numbers, gated: bool, rows: int, is_hopper: bool) -> Tile:
    """Return the tile for types of numbers and the expected rows per expert.

    A step along D takes 128 bytes of a row for any tile, so the choice does not change the result.
    Compiled for Hopper, no tile spills more than a few registers, and none of integers spills any.
    Before Hopper operands take registers, too, so sums of int8 get a tile half as wide.
    """
    is_int8 = numbers.bits > 0 and numbers.quantized
    is_decoded = numbers.fp8 and numbers.quantized and not numbers.native
    if is_int8:  # has no tiles of few rows
        rows = max(rows, 64)
    if numbers.itemsize == 4 or is_decoded:  # no matrix unit, or bytes decoded in registers
        features = 64 if is_decoded and not gated else 32
        if rows <= 16:
            return Tile(rows=16, features=features, warps=4, stages=3, per_sm=2)
        return Tile(rows=64, features=features, warps=8, stages=3, per_sm=2)
    if rows <= 8:
        return Tile(rows=16, features=32 if gated else 64, warps=4, stages=6, per_sm=2)
    if rows <= 24:
        return Tile(rows=32, features=32 if gated else 64, warps=4, stages=5, per_sm=2)
    is_narrow = numbers.dequantizes_integers  # in registers
    if rows <= 64:
        features = 64 if gated else 128
        width = features // 2 if is_narrow else features
        return Tile(rows=64, features=width, warps=4, stages=4, per_sm=2)
    is_narrow = is_narrow or (is_int8 and not is_hopper)
    return Tile(rows=128, features=64 if gated and is_narrow else 128, warps=8, stages=4, per_sm=1)


@dataclass(frozen=True, slots=True)
class Launch:
    """The launch of one product.

    Attributes:
        x, x_scale: rows as kernels take them (FP8 possibly as bytes), and their scales.
        w, w_scale: the same for the matrices.
        w_zero: zeros of int4; not read unless `has_zeros`.
        numbers: types of the numbers.
        gated: True if the matrices are gate and up.
        tile: of the result.
        step: columns that are multiplied at a time.
        group: columns that share a scale of integers; else 0.
        has_zeros: groups have a zero.
    """

    x: Tensor
    x_scale: Tensor
    w: Tensor
    w_scale: Tensor
    w_zero: Tensor
    numbers: Numbers
    gated: bool
    tile: Tile
    step: int
    group: int = 0
    has_zeros: bool = False

    def uses_tma(self) -> bool:
        """Return True if tiles of W are loaded through TMA: many rows, on Hopper or later."""
        numbers = self.numbers
        if self.tile.rows < 64 or numbers.itemsize == 4 or numbers.dequantizes_integers:
            return False
        is_fp8 = numbers.fp8 and numbers.quantized
        if self.gated and is_fp8 and self.tile.features == BLOCK:
            return False  # too few registers: the loop would spill
        row_bytes = self.w.shape[2] * self.w.element_size()
        return row_bytes % 16 == 0 and self.w.data_ptr() % 16 == 0 and has_tma(self.w)

    def matrices(self) -> Any:
        """Return the matrices as a TMA descriptor of tiles, or as a tensor."""
        if not self.uses_tma():
            return self.w
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [self.tile.features, self.step]
        return TensorDescriptor.from_tensor(self.w.flatten(0, 1), shape)

    def constants(self) -> dict[str, int]:
        """Return the kernel's compile-time arguments and launch options."""
        # Shared memory per program, without scales and reserved bytes.
        room = launch_gpu(self.w).shared_bytes // self.tile.per_sm - 5120
        features = self.tile.features * (2 if self.gated else 1)
        w_bytes, most = BLOCK, self.tile.stages
        if self.group:
            w_bytes = self.step * self.w.shape[2] // self.x.shape[1]
            most = min(16, most * BLOCK // w_bytes)
        step_bytes = self.step * self.x.element_size() * self.tile.rows + w_bytes * features
        stages = max(2, min(most, room // step_bytes))
        return {
            "FP8": self.numbers.fp8,
            "BITS": self.numbers.bits,
            "QUANTIZED": self.numbers.quantized,
            "NATIVE": self.numbers.native,
            "GROUP": self.group,
            "ZEROS": self.has_zeros,
            "TMA": self.uses_tma(),
            "INTERPRETED": is_interpreted(self.w),
            "E_PAD": next_power_of_2(len(self.w)),
            "BLOCK_M": self.tile.rows,
            "BLOCK_N": self.tile.features,
            "BLOCK_K": self.step,
            "STAGES": stages,
            "num_warps": self.tile.warps,
            "num_stages": stages,
        }

    def grid(self, features: int, num_rows: int) -> tuple[int]:
        """Return the grid: all programs that run at once, at most one per possible tile."""
        most = num_rows // self.tile.rows + min(len(self.w), num_rows)
        programs = launch_gpu(self.w).multiprocessors * self.tile.per_sm
        return (min(programs, most * cdiv(features, self.tile.features)),)


def launch_of(x: Tensor | Quantized, w: Stack, gated: bool, rows: int) -> Launch:
    """Return the launch of the product of `x` and `w` for `rows` expected rows per expert."""
    if w.group:
        return _launch_of_integers(x, w, gated, rows)
    weight = e4m3_view(w.weight) if w.block_scale is not None else w.weight
    w_scale = weight if w.block_scale is None else w.block_scale
    x_rows = x if isinstance(x, Tensor) else e4m3_view(x.q)
    x_scale = x if isinstance(x, Tensor) else x.scale
    assert x_rows.shape[1] == weight.shape[2], f"{x_rows.shape=} {weight.shape=}"
    assert all(t.is_contiguous() for t in (x_rows, x_scale, weight, w_scale)), f"{weight.stride()=}"
    if isinstance(x, Quantized):
        assert w.block_scale is not None and x_rows.shape[1] % BLOCK == 0, f"{x_rows.shape=}"
    else:
        assert w.block_scale is not None or weight.dtype == x.dtype, f"{x.dtype=} {weight.dtype=}"
    numbers = Numbers(
        itemsize=x_rows.element_size(),
        fp8=w.block_scale is not None,
        bits=0,
        quantized=isinstance(x, Quantized),
        native=is_native(weight),
    )
    return Launch(
        x=x_rows,
        x_scale=x_scale,
        w=weight,
        w_scale=w_scale,
        w_zero=w_scale,
        numbers=numbers,
        gated=gated,
        tile=_tile(numbers, gated, rows, has_tma(weight)),
        step=BLOCK // numbers.itemsize,
    )


def _launch_of_integers(x: Tensor | Quantized, w: Stack, gated: bool, rows: int) -> Launch:
    weight, scale = w.weight, w.block_scale
    bits = w.integers(0).bits
    is_quantized = isinstance(x, Quantized)
    x_rows = x.q if isinstance(x, Quantized) else x
    itemsize, cols = x_rows.element_size(), x_rows.shape[1]
    assert scale is not None and weight.shape[2] * 8 == cols * bits, f"{x_rows.shape=} {w.group=}"
    assert all(t.is_contiguous() for t in (x_rows, weight, scale)), f"{weight.stride()=}"
    assert not is_quantized or (bits == 8 and w.group >= cols), f"{bits=} {w.group=}"
    numbers = Numbers(
        itemsize=itemsize,
        fp8=False,
        bits=bits,
        quantized=is_quantized,
        native=is_native(weight),
    )
    return Launch(
        x=x_rows,
        x_scale=x.scale if isinstance(x, Quantized) else x,
        w=weight,
        w_scale=scale,
        w_zero=scale if w.zero is None else w.zero,
        numbers=numbers,
        gated=gated,
        tile=_tile(numbers, gated, rows, has_tma(weight)),
        step=BLOCK if is_quantized else step_of(w.group, cols, itemsize),
        group=w.group,
        has_zeros=w.zero is not None,
    )
