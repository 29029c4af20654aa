"""Weight matrices of layers: rows of several checkpoint tensors packed into one.

The layer that builds a matrix declares its packing (`{"q_a_proj": 1536, "kv_a_proj_with_mqa":
576}`) and whether it may be kept quantized. The loader iterates over `targets()` and fills the
memory in place; the memory plan builds the model on torch's meta device and adds up its bytes. How
a matrix is held is known to its storage alone (`storage.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.parallel.module import Module
from dsv3.parallel.storage import Floats, Fp8Blocks, Fp8Products, IntegerGroups, Storage
from dsv3.parallel.weight_format import WeightFormat
from dsv3_kernels import Quantized, Stack
from dsv3_kernels.fp8_format import BLOCK


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
        storage: the matrices.
        is_cut: the matrix would be kept quantized if no edge cut its blocks or groups.
    """

    storage: Storage

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
        self._is_packable = fmt.cpu_products and not by_rows
        shape = (len(names), sum(rows), cols)
        kept: Storage | None = None
        if quantized:
            integers = fmt.kept_integers(names, sum(rows), cols, col_offset)
            edges = (row_offset, col_offset, *rows[:-1])
            if integers is not None:
                kept = IntegerGroups.empty(shape, integers, fmt)
            elif fmt.keeps_fp8(names, cols) and not any(edge % BLOCK for edge in edges):
                kept = (Fp8Products if fmt.fp8_products else Fp8Blocks).empty(shape, fmt)
        self.storage = kept or Floats.empty(shape, fmt, by_rows)
        self.is_cut = quantized and kept is None and fmt.stores_quantized(names)

    @property
    def weight(self) -> Tensor:
        """The values as they are stored, [E, ...]."""
        return self.storage.weight

    @property
    def quantizes(self) -> bool:
        """The product is in FP8, so its input is best produced in FP8."""
        return self.storage.quantizes

    @property
    def int8_products(self) -> bool:
        """Products with many rows are in int8."""
        return self.storage.int8_products

    def targets(self) -> Iterator[Target]:
        """Yield a view for every part of every stacked matrix; undo `pack` of plain matrices."""
        self.storage = storage = self.storage.loadable()
        for e, parts in enumerate(self.names):
            start = 0
            for name, rows in zip(parts, self.rows, strict=True):
                views = storage.views(e, slice(start, start + rows))
                yield Target(name, views.dest, views.scale, views.zero, self._must_be_finite)
                start += rows

    def matrix(self, e: int = 0) -> Tensor:
        """Return matrix `e` in the compute dtype, [rows, cols]; a copy unless `by_rows`."""
        return self.storage.loadable().matrix(e)

    def multiply(
        self, x_TD: Tensor | Quantized, locks: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return x W^T of the first matrix in `dtype`, by default the compute dtype."""
        return self.storage.linear(x_TD, locks, dtype or self.dtype)

    def pack(self) -> None:
        """Arrange a loaded matrix for the products of a CPU."""
        if self._is_packable:
            self.storage = self.storage.for_cpu()

    def stack(self) -> Stack:
        """Return all matrices as the argument of `dsv3_kernels.experts`."""
        return self.storage.stack()

    def take(self, stacked: list[int]) -> list[Tensor]:
        """Return copies of the given stacked matrices and of their scales, as bytes."""
        return self.storage.take(stacked)

    def put(self, stacked: list[int], values: list[Tensor]) -> None:
        """Overwrite the given stacked matrices with the result of another rank's `take`."""
        self.storage.put(stacked, values)


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
