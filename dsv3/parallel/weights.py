"""Weight matrices of layers: rows of several checkpoint tensors packed into one.

The layer that builds a matrix declares its packing (`{"q_a_proj": 1536, "kv_a_proj_with_mqa":
576}`) and whether it may be kept in FP8. The loader iterates over `targets()` and fills the memory
in place; the memory plan builds the model on torch's meta device and adds up its bytes.

A matrix is kept in the compute dtype or, if the checkpoint stores it quantized and the user keeps
it, as e4m3 with one scale per 128 x 128 block, or as integers with one scale per group of columns.
If the edge of this rank's slice or of a packed part cuts a block or a group, the matrix is kept in
the compute dtype and the loader dequantizes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv3.parallel.module import Module
from dsv3_kernels import (
    Integers,
    Stack,
    experts,
    has_blocked_product,
    has_cpu_product,
    int_dequant,
    pack_for_cpu,
    to_blocked,
    weight_dequant,
)
from dsv3_kernels.fp8_format import BLOCK, FP8


@dataclass(frozen=True)
class Target:
    """One checkpoint tensor, and the memory for this rank's part of it.

    Attributes:
        name: of the tensor.
        dest: view of a parameter.
        scale: view of the scales if `dest` is FP8 or integers; None if the loader dequantizes.
        zero: view of the zeros of int4's groups, if they have some.
        must_be_finite: loading refuses infinities, because they would not show in the logits.
    """

    name: str
    dest: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    must_be_finite: bool = False


class KeptIntegers(NamedTuple):
    """How an integer weight is held.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale; 0 for a whole row.
        scale: dtype of the scales.
        has_zeros: each group has a zero, too.
    """

    bits: int
    group: int
    scale: torch.dtype
    has_zeros: bool = False


@dataclass(frozen=True)
class WeightFormat:
    """Storage format of weights.

    Attributes:
        dtype: of activations, and of weights not kept in FP8.
        device: of the weights.
        fp8_names: weights to keep in FP8 if no edge cuts their blocks.
        fp8_products: multiply them by activations in FP8; this needs whole blocks of columns.
        ue8m0: the scales of those activations are powers of two.
        bf16_vectors: `Vector` weights to keep in bfloat16.
        integers: weights to keep as integers if no edge cuts their groups.
        int8_products: multiply int8 weights with a scale per row by many activations in int8; this
            needs whole blocks of columns.
        cpu_products: integers are multiplied by torch's products on CPUs, and are kept only where
            there is one.
    """

    dtype: torch.dtype
    device: torch.device
    fp8_names: frozenset[str] = field(default_factory=frozenset)
    fp8_products: bool = False
    ue8m0: bool = False
    bf16_vectors: frozenset[str] = field(default_factory=frozenset)
    integers: Mapping[str, KeptIntegers] = field(default_factory=dict)
    int8_products: bool = False
    cpu_products: bool = False

    @property
    def numerics(self) -> str:
        """Float32, bfloat16, fp8 or int8, as in the settings."""
        products = "int8" if self.int8_products else str(self.dtype).removeprefix("torch.")
        return "fp8" if self.fp8_products else products

    @property
    def kept(self) -> tuple[str, ...]:
        """The quantized formats that weights are held in."""
        kinds = {f"int{kind.bits}" for kind in self.integers.values()}
        return (*(["fp8"] if self.fp8_names else []), *sorted(kinds))

    def kept_integers(self, names: list[list[str]], rows: int, cols: int) -> KeptIntegers | None:
        """Return how a matrix of these weights is held as integers; None if it is not.

        Args:
            names: checkpoint names of the parts, one list per stacked matrix.
            rows: rows of all parts.
            cols: columns.
        """
        kinds = {self.integers.get(name) for parts in names for name in parts}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None or not rows or not cols:
            return None
        group = kind.group or cols
        is_whole = cols % group == 0 and (cols % 2 == 0 or kind.bits == 8)
        if not is_whole or (kind.group and kind.group % 32):
            return None
        if self.cpu_products and not has_cpu_product(kind.bits, group, rows, cols):
            return None
        return kind


class Matrix(Module):
    """[rows, cols], or [E, rows, cols] for stacked experts, packed from named parts.

    Args:
        names: checkpoint names of the parts, one list per stacked matrix.
        rows: rows of each part, in order.
        cols: columns.
        fmt: dtype and device.
        row_offset, col_offset: first row and column of the parts in their checkpoint tensors.
        quantized: may be kept quantized, if `fmt` keeps all of its parts so.
        must_be_finite: see `Target`.
        by_rows: rows stay contiguous: they are looked up, or slices of them are multiplied by.

    Attributes:
        block_scale: [E, ceil(rows / 128), ceil(cols / 128)] float32 of a matrix kept in FP8;
            [E, rows, groups] of integers.
        group: columns that share a scale of integers; 0 if the matrix is not kept so.
        block_zero: [E, rows, groups] uint8 of integers with zeros.
        quantizes: the product is in FP8, so its input is best produced in FP8.
        int8_rows: products with many rows are in int8.
        is_cut: the matrix would be kept quantized if no edge cut its blocks or groups.
    """

    block_scale: Tensor | None
    _weights: tuple[Tensor, ...]
    _scales: tuple[Tensor, ...]
    block_zero: Tensor | None

    def __init__(
        self,
        names: list[list[str]],
        rows: list[int],
        cols: int,
        fmt: WeightFormat,
        *,
        row_offset: int = 0,
        col_offset: int = 0,
        quantized: bool = True,
        must_be_finite: bool = False,
        by_rows: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = fmt.dtype
        self.ue8m0 = fmt.ue8m0
        self.names = names
        self.rows = rows
        self._must_be_finite = must_be_finite
        is_kept = quantized and bool(names) and _are_all_in(fmt.fp8_names, names)
        is_whole = not any(edge % BLOCK for edge in (row_offset, col_offset, *rows[:-1]))
        if fmt.fp8_products:
            is_whole = is_whole and cols > 0 and cols % BLOCK == 0
        is_fp8 = is_kept and is_whole
        integers = fmt.kept_integers(names, sum(rows), cols) if quantized else None
        if integers is not None and integers.group and col_offset % integers.group:
            integers = None
        is_stored_so = quantized and bool(names) and all(n in fmt.integers for n in names[0])
        self.is_cut = (is_kept and not is_whole) or (is_stored_so and integers is None)
        self.group = 0 if integers is None else integers.group or cols
        is_whole_row = self.group == cols and cols > 0 and cols % BLOCK == 0
        is_int8 = integers is not None and integers.bits == 8
        self.int8_rows = fmt.int8_products and is_int8 and is_whole_row
        self._packed = False
        self._for_cpu = fmt.cpu_products
        self._is_factor = not by_rows
        self.quantizes = is_fp8 and fmt.fp8_products
        shape = (len(names), sum(rows), cols)
        scale_shape, scale_dtype = (0, 0, 0), torch.float32
        if integers is not None:
            data = _empty_integers(shape, integers, fmt.device)
            scale_shape, scale_dtype = (*shape[:2], cols // self.group), integers.scale
        elif is_fp8 or by_rows:
            data = torch.empty(shape, dtype=FP8 if is_fp8 else fmt.dtype, device=fmt.device)
        else:
            data = _empty_factor(shape, fmt)
        self._set_weight(data)
        scale = None
        if is_fp8:
            scale_shape = (len(names), -(-sum(rows) // BLOCK), -(-cols // BLOCK))
        if is_fp8 or integers is not None:
            scale = torch.empty(scale_shape, dtype=scale_dtype, device=fmt.device)
        self.register_buffer("block_scale", scale, persistent=False)
        self._scales = () if scale is None else scale.unbind()
        zero = None
        if integers is not None and integers.has_zeros:
            zero = torch.empty(scale_shape, dtype=torch.uint8, device=fmt.device)
        self.register_buffer("block_zero", zero, persistent=False)

    @property
    def blocked(self) -> tuple[Tensor, ...]:
        """The matrices if they are blocked for a CPU (see `pack`); `weight` is empty then."""
        return self._weights if self._weights and self._weights[0].is_mkldnn else ()

    def targets(self) -> Iterator[Target]:
        """Yield a view for every part of every stacked matrix; undo `pack` of plain matrices."""
        if self.blocked:
            self._set_weight(torch.stack([w.to_dense() for w in self.blocked]))
        for e, parts in enumerate(self.names):
            start = 0
            for name, rows in zip(parts, self.rows, strict=True):
                dest = self.weight[e, start : start + rows].detach()
                scale = zero = None
                if self.group and self.block_scale is not None:
                    scale = self.block_scale[e, start : start + rows]
                    if self.block_zero is not None:
                        zero = self.block_zero[e, start : start + rows]
                elif self.block_scale is not None:
                    blocks = slice(start // BLOCK, -(-(start + rows) // BLOCK))
                    scale = self.block_scale[e, blocks]
                yield Target(name, dest, scale, zero, self._must_be_finite)
                start += rows

    def matrix(self, e: int = 0) -> Tensor:
        """Return matrix `e` in the compute dtype, [rows, cols]; for `linear` only, after `pack`."""
        if not self._scales:
            return self._weights[e]
        if self.group:
            return int_dequant(self.integers(e), self.dtype)
        return weight_dequant(self._weights[e], self._scales[e], self.dtype)

    def integers(self, e: int = 0) -> Integers:
        """Return matrix `e` of a matrix kept as integers."""
        zero = None if self.block_zero is None else self.block_zero[e]
        return Integers(self._weights[e], self._scales[e], self.group, self._packed, zero)

    def pack(self) -> None:
        """Arrange a loaded matrix for the products of a CPU."""
        if not self._for_cpu or self._packed or self.blocked:
            return
        if self.group:
            packed = [pack_for_cpu(self.integers(e)) for e in range(len(self.names))]
            self._scales = tuple(w.scale for w in packed)
            self._packed = True
        elif self._is_factor and has_blocked_product(self.weight):
            blocked = tuple(to_blocked(w) for w in self._weights)
            self._set_weight(self.weight.new_empty((len(blocked), 0, 0)))
            self._weights = blocked

    def _set_weight(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._weights = self.weight.unbind()  # views, made once instead of at every use

    def stack(self) -> Stack:
        """Return all matrices as the argument of `dsv3_kernels.experts`."""
        return Stack(
            weight=self.weight,
            block_scale=self.block_scale,
            unbound=self._weights,
            group=self.group,
            packed=self._packed,
            scales=self._scales,
            zero=self.block_zero,
        )

    def take(self, stacked: list[int]) -> list[Tensor]:
        """Return copies of the given stacked matrices and of their scales, as bytes."""
        if self.blocked:
            plain = torch.empty((len(stacked), *self.blocked[0].shape), dtype=self.dtype)
            for to, e in enumerate(stacked):
                plain[to] = self.blocked[e].to_dense()
            return [plain.view(torch.uint8)]
        return [t[stacked] for t in self._bytes()]

    def put(self, stacked: list[int], values: list[Tensor]) -> None:
        """Overwrite the given stacked matrices with the result of another rank's `take`."""
        if self.blocked:
            blocked = list(self.blocked)
            for e, value in zip(stacked, values[0], strict=True):
                blocked[e] = to_blocked(value.view(self.dtype))
            self._weights = tuple(blocked)
            return
        for t, value in zip(self._bytes(), values, strict=True):
            t[stacked] = value

    def _bytes(self) -> list[Tensor]:
        """Return views of weights and scales as bytes, because Gloo does not support FP8."""
        tensors = (*self.parameters(), *self.buffers())
        return [(t if t.is_contiguous() else t.mT).view(torch.uint8) for t in tensors]


def _empty_integers(
    shape: tuple[int, int, int], integers: KeptIntegers, device: torch.device
) -> Tensor:
    if integers.bits == 8:
        return torch.empty(shape, dtype=torch.int8, device=device)
    return torch.empty((*shape[:2], shape[2] // 2), dtype=torch.uint8, device=device)


def _empty_factor(shape: tuple[int, int, int], fmt: WeightFormat) -> Tensor:
    """Return memory for stacked matrices W that products x W^T read.

    On a CPU its longer dim is contiguous: if that is W^T, a product with few rows of x takes up to
    two thirds less time, with 64 rows a tenth. Kernels need W itself contiguous.
    """
    count, rows, cols = shape
    is_plain = fmt.device.type != "cpu" or fmt.dtype != torch.float32 or rows < cols
    if is_plain or experts.uses_triton(fmt):
        return torch.empty(shape, dtype=fmt.dtype, device=fmt.device)
    return torch.empty((count, cols, rows), dtype=fmt.dtype, device=fmt.device).mT


def _are_all_in(known: frozenset[str], names: list[list[str]]) -> bool:
    return all(name in known for part in names for name in part)


class Vector(Module):
    """A small replicated tensor (norms, router), kept in float32 unless `fmt` says otherwise."""

    def __init__(self, name: str, shape: tuple[int, ...], fmt: WeightFormat) -> None:
        super().__init__()
        self.name = name
        dtype = torch.bfloat16 if name in fmt.bf16_vectors else torch.float32
        data = torch.empty(shape, dtype=dtype, device=fmt.device)
        self.weight = nn.Parameter(data, requires_grad=False)

    def targets(self) -> Iterator[Target]:
        """Yield the whole tensor."""
        yield Target(self.name, self.weight.detach(), must_be_finite=True)
