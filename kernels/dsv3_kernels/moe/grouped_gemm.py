"""Products of rows with the matrices of their experts: what `grouped_gate_up` and `_down` share.

Rows lie sorted by expert, or in a box of equal capacity for each (`permute.Groups`). A persistent
grid shares out the tiles that the counts on the device ask for: experts without rows cost nothing
and the host knows no count. For few rows operands are swapped (a tile is W x^T): matrix units take
at least 64 of what stands first, and as few as 16 of the other. Tiles of many rows are x W^T, W
through TMA where there is one. In either case an element is the same chain of sums of 128 bytes
along D, so a row's result depends on no other row. (That the chains give the same bits swapped and
not holds wherever matrix units treat both operands alike; `tests/kernels/test_grouped_gemm.py`
asserts it on a GPU.)

Three kinds of numbers: float (one type, float32 sums; float32 itself without TF32), float rows with
FP8 matrices (dequantized in registers, as `weight_dequant` would), and FP8 rows quantized 1x128
with FP8 matrices (partial sums of 128 scaled and added in float32).

Bound: reading the matrices that are hit up to about 64 rows an expert, then matrix units.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._triton import has_tma, is_interpreted, multiprocessors, triton
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import BLOCK, Quantized
from dsv3_kernels.gemm.weight_dequant import weight_dequant
from dsv3_kernels.moe.permute import Groups


class Stack(NamedTuple):
    """The matrices of the local experts.

    Attributes:
        weight: [E, N, D], float or float8_e4m3fn.
        block_scale: [E, ceil(N / 128), ceil(D / 128)] float32 where the matrices are FP8.
    """

    weight: Tensor
    block_scale: Tensor | None = None

    def matrix(self, e: int, dtype: torch.dtype) -> Tensor:
        """Return matrix `e`, [N, D], dequantized to `dtype` where it is FP8."""
        if self.block_scale is None:
            return self.weight[e]
        return weight_dequant(self.weight[e], self.block_scale[e], dtype)


def dequantize(x: Tensor | Quantized) -> Tensor:
    """Return the values that FP8 rows stand for, float32; float rows as they are."""
    if isinstance(x, Tensor):
        return x
    return (x.q.float().unflatten(-1, (-1, BLOCK)) * x.scale.unsqueeze(-1)).flatten(-2)


def products(x: Tensor, w: Stack, groups: Groups) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of every expert that is hit, and their products with its matrix."""
    starts, counts = groups.start_E.tolist(), groups.count_E.tolist()
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            rows = slice(start, start + count)
            yield rows, F.linear(x[rows], w.matrix(e, x.dtype))


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and features (of the gate, and as many of up) of a tile, and how it is run."""

    rows: int
    features: int
    warps: int
    stages: int
    per_sm: int


def _tile(kind: int, itemsize: int, gated: bool, rows: int) -> Tile:
    """Choose by the kind of numbers and by how many rows an expert can expect.

    A step along D takes 128 bytes of a row whatever the tile, so the choice changes no bits.
    Compiled for Hopper none spills more than a few registers.
    """
    if itemsize == 4 or kind == 4:  # no matrix unit, or bytes decoded in registers
        features = 64 if itemsize == 1 and not gated else 32
        return Tile(16, features, 4, 3, 2) if rows <= 16 else Tile(64, features, 8, 3, 2)
    if rows <= 8:
        return Tile(16, 32 if gated else 64, 4, 6, 2)
    if rows <= 24:
        return Tile(32, 32 if gated else 64, 4, 5, 2)
    if rows <= 64:
        return Tile(64, 64 if gated else 128, 4, 4, 2)
    return Tile(128, 128, 8, 4, 1)


@dataclass(frozen=True, slots=True)
class Launch:
    """One product: rows and matrices as kernels take them (FP8 perhaps as bytes), and how it runs.

    Attributes:
        kind: of numbers; see `_grouped_tiles`.
        gated: matrices are gate and up.
    """

    x: Tensor
    x_scale: Tensor
    w: Tensor
    w_scale: Tensor
    kind: int
    gated: bool
    tile: Tile

    def uses_tma(self) -> bool:
        """Tell whether tiles of W come through TMA: many rows, on Hopper or later."""
        if self.tile.rows < 64 or self.x.element_size() == 4:
            return False
        if self.gated and self.kind == 2 and self.tile.features == BLOCK:
            return False  # no registers are left for it: the loop would spill
        row_bytes = self.w.shape[2] * self.w.element_size()
        return row_bytes % 16 == 0 and self.w.data_ptr() % 16 == 0 and has_tma(self.w)

    def matrices(self) -> Any:
        """Return the matrices as a descriptor of tiles, or as they are."""
        if not self.uses_tma():
            return self.w
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [self.tile.features, BLOCK // self.x.element_size()]
        return TensorDescriptor.from_tensor(self.w.flatten(0, 1), shape)

    def constants(self) -> dict[str, int]:
        """Return what is compiled into the kernel."""
        # Less scales, and what is reserved.
        room = multiprocessors(self.w)[1] // self.tile.per_sm - 5120
        step = BLOCK * (self.tile.rows + self.tile.features * (2 if self.gated else 1))
        return {
            "KIND": self.kind,
            "TMA": self.uses_tma(),
            "INTERPRETED": is_interpreted(self.w),
            "E_PAD": triton.next_power_of_2(len(self.w)),
            "BLOCK_M": self.tile.rows,
            "BLOCK_N": self.tile.features,
            "BLOCK_K": BLOCK // self.x.element_size(),
            "num_warps": self.tile.warps,
            "num_stages": max(2, min(self.tile.stages, room // step)),
        }

    def grid(self, features: int, num_rows: int) -> tuple[int]:
        """Return as many programs as the GPU holds at once, or as may have tiles, if fewer."""
        most = num_rows // self.tile.rows + min(len(self.w), num_rows)
        held = multiprocessors(self.w)[0] * self.tile.per_sm
        return (min(held, most * triton.cdiv(features, self.tile.features)),)


def launch_of(x: Tensor | Quantized, w: Stack, gated: bool, rows: int) -> Launch:
    """Return the product of `x` and `w` where an expert can expect `rows` rows."""
    native = is_native(w.weight)
    weight = e4m3_view(w.weight) if w.block_scale is not None else w.weight
    w_scale = weight if w.block_scale is None else w.block_scale
    x_rows, x_scale = (x, x) if isinstance(x, Tensor) else (e4m3_view(x.q), x.scale)
    assert x_rows.shape[1] == weight.shape[2], f"{x_rows.shape=} {weight.shape=}"
    assert all(t.is_contiguous() for t in (x_rows, x_scale, weight, w_scale)), f"{weight.stride()=}"
    if isinstance(x, Quantized):
        assert w.block_scale is not None and x_rows.shape[1] % BLOCK == 0, f"{x_rows.shape=}"
        kind = 2 if native else 4
    else:
        assert w.block_scale is not None or weight.dtype == x.dtype, f"{x.dtype=} {weight.dtype=}"
        kind = 0 if w.block_scale is None else 1 if native else 3
    tile = _tile(kind, x_rows.element_size(), gated, rows)
    return Launch(x_rows, x_scale, weight, w_scale, kind, gated, tile)
