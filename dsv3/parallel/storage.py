"""Storage forms of weight matrices, a class for each.

A storage holds E stacked matrices [rows, cols]. It owns their memory, gives the loader views of it,
multiplies by them, and moves matrices between ranks. The form follows from what the checkpoint
stores, what the user keeps, and the edges of this rank's slice: if one cuts a block or a group, the
matrices are `Floats`, and the loader dequantizes them.

    Floats               the compute dtype
    Fp8Blocks            e4m3 with a scale per 128 x 128 block, dequantized for products
    Fp8Products          the same, multiplied in FP8
    IntegerGroups        integers of 8 or 4 bits with a scale per group of columns
    BlockedFloats        bfloat16 in the layout of a CPU's products (`for_cpu`)
    PackedIntegerGroups  integers in the layout of a CPU's products (`for_cpu`)
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from dsv3.parallel.module import Module
from dsv3.parallel.weight_format import KeptIntegers, WeightFormat
from dsv3_kernels import (
    Integers,
    PackedIntegers,
    Quantized,
    Stack,
    act_quant,
    as_dtype,
    blocked_linear,
    cpu_product,
    experts,
    fp8_gemm,
    has_blocked_product,
    int_dequant,
    int_linear,
    linear,
    pack_for_cpu,
    to_blocked,
    weight_dequant,
)
from dsv3_kernels.fp8_format import BLOCK, FP8

_LARGE = 1 << 20  # values of a matrix that no processor keeps in its nearer caches


class Views(NamedTuple):
    """Memory for rows of one matrix: values, and scales and zeros if the form has them."""

    dest: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


class Storage(Module, ABC):
    """Stacked matrices in one form.

    Attributes:
        weight: [E, ...] the values.
        block_scale: [E, ...] scales of blocks or groups.
        block_zero: [E, rows, groups] uint8 zeros of int4's groups, if they have some.
        dtype: compute dtype.
        is_quantized: the matrices are held as the checkpoint stores them, quantized.
        quantizes: products are in FP8, so the input is best produced in FP8.
        int8_products: products with many rows are in int8.
    """

    is_quantized = False
    quantizes = False
    int8_products = False
    block_scale: Tensor | None
    block_zero: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("block_scale", scale, persistent=False)
        self.register_buffer("block_zero", zero, persistent=False)
        # Views, made once instead of at every use.
        self._each = self.weight.unbind()
        self._scales = () if scale is None else scale.unbind()

    @abstractmethod
    def product(self, e: int, x_TD: Tensor) -> Tensor:
        """Return x W^T of matrix `e` in the dtype of `x_TD`: the compute dtype, or dequantized."""

    def multiply(self, e: int, x_TD: Tensor, out_TF: Tensor) -> None:
        """Write `product` to `out_TF`, of any float dtype."""
        out_TF.copy_(self.product(e, x_TD))

    def linear(self, x_TD: Tensor | Quantized, locks: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x W^T of the first matrix.

        Args:
            x_TD: any float dtype; may be in FP8 if `quantizes`.
            locks: `make_locks` of the matrix.
            dtype: of the result.
        """
        assert isinstance(x_TD, Tensor)
        return as_dtype(self.product(0, as_dtype(x_TD, self.dtype)), dtype)

    def stack(self) -> Stack:
        """Return all matrices as the argument of `dsv3_kernels.experts`."""
        return Stack(self.weight, multiplier=self.multiply)

    def for_cpu(self) -> "Storage":
        """Return the loaded matrices in the form of a CPU's products; this one may be lost."""
        return self

    def loadable(self) -> "LoadableStorage":
        """Return the matrices in the form that the loader fills."""
        raise AssertionError(f"{type(self).__name__} is not loaded again")

    def take(self, stacked: list[int]) -> list[Tensor]:
        """Return copies of the given matrices and of their scales, as bytes."""
        return [t[stacked] for t in self._bytes()]

    def put(self, stacked: list[int], values: list[Tensor]) -> None:
        """Overwrite the given matrices with the result of another rank's `take`."""
        for t, value in zip(self._bytes(), values, strict=True):
            t[stacked] = value

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices and their scales."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def _bytes(self) -> list[Tensor]:
        """Return views of weights and scales as bytes, because Gloo does not support FP8."""
        tensors = (*self.parameters(), *self.buffers())
        return [(t if t.is_contiguous() else t.mT).view(torch.uint8) for t in tensors]


class LoadableStorage(Storage):
    """Matrices as the loader fills them, row by row."""

    @abstractmethod
    def views(self, e: int, rows: slice) -> Views:
        """Return the memory of some rows of matrix `e`."""

    @abstractmethod
    def matrix(self, e: int) -> Tensor:
        """Return matrix `e` in the compute dtype, [rows, cols]."""

    def loadable(self) -> "LoadableStorage":
        """Return this storage."""
        return self


class Floats(LoadableStorage):
    """Matrices in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, weight.dtype)

    @classmethod
    def empty(cls, shape: tuple[int, int, int], fmt: WeightFormat, by_rows: bool) -> "Floats":
        """Allocate [E, rows, cols].

        On a CPU W^T is contiguous if W is float32: a product with few rows of x takes up to two
        thirds less time, with 64 rows a sixth. Only of one or two rows by a large, wide W it takes
        more, a third. Kernels need W itself contiguous, and so does a matrix used `by_rows`.
        """
        count, rows, cols = shape
        is_wide = rows < cols and rows * cols > _LARGE
        is_plain = fmt.device.type != "cpu" or fmt.dtype != torch.float32 or is_wide
        if by_rows or is_plain or experts.uses_triton(fmt):
            return cls(torch.empty(shape, dtype=fmt.dtype, device=fmt.device))
        return cls(torch.empty((count, cols, rows), dtype=fmt.dtype, device=fmt.device).mT)

    def matrix(self, e: int) -> Tensor:
        """Return matrix `e`."""
        return self._each[e]

    def views(self, e: int, rows: slice) -> Views:
        """Return the memory of some rows."""
        return Views(self.weight[e, rows].detach())

    def product(self, e: int, x_TD: Tensor) -> Tensor:
        """Return x W^T."""
        return linear(x_TD, self._each[e])

    def multiply(self, e: int, x_TD: Tensor, out_TF: Tensor) -> None:
        """Write x W^T."""
        w_FD = self._each[e]
        if x_TD.dtype == w_FD.dtype == out_TF.dtype:
            torch.mm(x_TD, w_FD.t(), out=out_TF)
        else:
            out_TF.copy_(self.product(e, x_TD))

    def linear(self, x_TD: Tensor | Quantized, locks: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x W^T; of few bfloat16 rows on a GPU rounded once."""
        assert isinstance(x_TD, Tensor)
        return linear(as_dtype(x_TD, self.dtype), self._each[0], dtype, locks)

    def for_cpu(self) -> Storage:
        """Return `BlockedFloats` if products are faster so."""
        return BlockedFloats(self.weight) if has_blocked_product(self.weight) else self


class BlockedFloats(Storage):
    """bfloat16 matrices in the layout of a CPU's products; `weight` has no columns."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight[:, :, :0].clone(), weight.dtype)
        self._blocked = [to_blocked(w) for w in weight]

    def product(self, e: int, x_TD: Tensor) -> Tensor:
        """Return x W^T."""
        return blocked_linear(x_TD, self._blocked[e])

    def loadable(self) -> Floats:
        """Return plain copies."""
        return Floats(torch.stack([w.to_dense() for w in self._blocked]))

    def take(self, stacked: list[int]) -> list[Tensor]:
        """Return plain copies of the given matrices, as bytes."""
        plain = torch.empty((len(stacked), *self._blocked[0].shape), dtype=self.dtype)
        for to, e in enumerate(stacked):
            plain[to] = self._blocked[e].to_dense()
        return [plain.view(torch.uint8)]

    def put(self, stacked: list[int], values: list[Tensor]) -> None:
        """Overwrite the given matrices."""
        for e, value in zip(stacked, values[0], strict=True):
            self._blocked[e] = to_blocked(value.view(self.dtype))

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocked matrices."""
        return sum(w.numel() * w.element_size() for w in self._blocked)


class Fp8Blocks(LoadableStorage):
    """e4m3 matrices with a scale per block, dequantized for each product."""

    is_quantized = True
    block_scale: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int], fmt: WeightFormat) -> Self:
        """Allocate [E, rows, cols] and [E, ceil(rows / 128), ceil(cols / 128)] float32 scales."""
        count, rows, cols = shape
        scale_shape = (count, -(-rows // BLOCK), -(-cols // BLOCK))
        scale = torch.empty(scale_shape, dtype=torch.float32, device=fmt.device)
        return cls(torch.empty(shape, dtype=FP8, device=fmt.device), fmt.dtype, scale)

    def matrix(self, e: int) -> Tensor:
        """Return matrix `e`, dequantized."""
        return weight_dequant(self._each[e], self._scales[e], self.dtype)

    def views(self, e: int, rows: slice) -> Views:
        """Return the memory of some rows, whose first begins a block."""
        blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
        return Views(self.weight[e, rows].detach(), self.block_scale[e, blocks])

    def product(self, e: int, x_TD: Tensor) -> Tensor:
        """Return x W^T."""
        return linear(x_TD, weight_dequant(self._each[e], self._scales[e], x_TD.dtype))

    def stack(self) -> Stack:
        """Return all matrices as the argument of `experts`."""
        return Stack(self.weight, self.block_scale, multiplier=self.multiply)


class Fp8Products(Fp8Blocks):
    """e4m3 matrices that are multiplied by activations in FP8."""

    quantizes = True
    ue8m0 = False

    @classmethod
    def empty(cls, shape: tuple[int, int, int], fmt: WeightFormat) -> Self:
        """Allocate as `Fp8Blocks`."""
        made = super().empty(shape, fmt)
        made.ue8m0 = fmt.ue8m0
        return made

    def linear(self, x_TD: Tensor | Quantized, locks: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x W^T of FP8 activations; others are quantized."""
        x = act_quant(x_TD, self.ue8m0) if isinstance(x_TD, Tensor) else x_TD
        return fp8_gemm(x, self._each[0], self._scales[0], dtype, locks)


class IntegerGroups(LoadableStorage):
    """Matrices of integers with a scale per group of columns.

    Args:
        q: see `Integers`.
        scale, zero: see `Integers`.
        group: columns that share a scale.
        dtype: compute dtype.
        int8_products: products with many rows are in int8; for int8 with a scale per row.
    """

    is_quantized = True
    block_scale: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        group: int,
        dtype: torch.dtype,
        int8_products: bool = False,
    ) -> None:
        super().__init__(q, dtype, scale, zero)
        self.group = group
        self.int8_products = int8_products
        zeros = [None] * len(q) if zero is None else zero.unbind()
        parts = zip(self._each, self._scales, zeros, strict=True)
        self._integers = [Integers(w, scales, group, z) for w, scales, z in parts]

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], kept: KeptIntegers, fmt: WeightFormat
    ) -> "IntegerGroups":
        """Allocate [E, rows, cols] values, two in a byte for int4, and [E, rows, groups] scales."""
        count, rows, cols = shape
        kind = kept.kind
        group = kind.group or cols
        value_dtype = torch.int8 if kind.bits == 8 else torch.uint8
        q_shape = (count, rows, cols * kind.bits // 8)
        scale_shape = (count, rows, cols // group)
        is_by_row = kind.bits == 8 and group == cols and cols % BLOCK == 0
        return cls(
            torch.empty(q_shape, dtype=value_dtype, device=fmt.device),
            torch.empty(scale_shape, dtype=kept.scale, device=fmt.device),
            torch.empty(scale_shape, dtype=torch.uint8, device=fmt.device)
            if kept.has_zeros
            else None,
            group,
            fmt.dtype,
            int8_products=fmt.int8_products and is_by_row,
        )

    def matrix(self, e: int) -> Tensor:
        """Return matrix `e`, dequantized."""
        return int_dequant(self._integers[e], self.dtype)

    def views(self, e: int, rows: slice) -> Views:
        """Return the memory of some rows."""
        zero = None if self.block_zero is None else self.block_zero[e, rows]
        return Views(self.weight[e, rows].detach(), self.block_scale[e, rows], zero)

    def product(self, e: int, x_TD: Tensor) -> Tensor:
        """Return x W^T."""
        return int_linear(x_TD, self._integers[e])

    def linear(self, x_TD: Tensor | Quantized, locks: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x W^T; many rows are quantized if `int8_products`."""
        assert isinstance(x_TD, Tensor)
        x = as_dtype(x_TD, self.dtype)
        return as_dtype(int_linear(x, self._integers[0], locks, self.int8_products), dtype)

    def stack(self) -> Stack:
        """Return all matrices as the argument of `experts`."""
        return Stack(self.weight, self.block_scale, self.group, self.block_zero, self.multiply)

    def for_cpu(self) -> "PackedIntegerGroups":
        """Rearrange the matrices in place."""
        return PackedIntegerGroups(self)


class PackedIntegerGroups(Storage):
    """Integers in the layout of a CPU's products, in the memory of a loaded storage."""

    is_quantized = True

    def __init__(self, loaded: IntegerGroups) -> None:
        super().__init__(loaded.weight.detach(), loaded.dtype, loaded.block_scale)
        self._packed: list[PackedIntegers] = [pack_for_cpu(w) for w in loaded._integers]

    def product(self, e: int, x_TD: Tensor) -> Tensor:
        """Return x W^T."""
        return cpu_product(x_TD, self._packed[e])
