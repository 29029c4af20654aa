"""How the weights of a model are held: dtype, device, and which of them stay quantized."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsv3.config_integers import IntegerKind
from dsv3_kernels import has_cpu_product
from dsv3_kernels.fp8_format import BLOCK


class KeptIntegers(NamedTuple):
    """How an integer weight is held.

    Attributes:
        kind: width, and columns that share a scale.
        scale: dtype of the scales.
        has_zeros: each group has a zero, too.
    """

    kind: IntegerKind
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
        kinds = {f"int{kept.kind.bits}" for kept in self.integers.values()}
        return (*(["fp8"] if self.fp8_names else []), *sorted(kinds))

    def kept_integers(
        self, names: list[list[str]], rows: int, cols: int, col_offset: int
    ) -> KeptIntegers | None:
        """Return how a matrix of these weights is held as integers; None if it is not.

        Args:
            names: checkpoint names of the parts, one list per stacked matrix.
            rows: rows of all parts.
            cols: columns.
            col_offset: first column in the checkpoint tensors.
        """
        kinds = {self.integers.get(name) for parts in names for name in parts}
        kept = kinds.pop() if len(kinds) == 1 else None
        if kept is None or not rows or not cols:
            return None
        kind = kept.kind
        group = kind.group or cols
        is_whole = cols % group == 0 and (cols % 2 == 0 or kind.bits == 8)
        if not is_whole or (kind.group and (kind.group % 32 or col_offset % kind.group)):
            return None
        if self.cpu_products and not has_cpu_product(kind.bits, group, rows, cols):
            return None
        return kept

    def keeps_fp8(self, names: list[list[str]], cols: int) -> bool:
        """Return True if these weights are held in FP8 where no edge cuts their blocks."""
        has_product = not self.fp8_products or (cols > 0 and cols % BLOCK == 0)
        return has_product and _are_all_in(self.fp8_names, names)

    def stores_quantized(self, names: list[list[str]]) -> bool:
        """Return True if these weights are held quantized where no edge cuts them."""
        return _are_all_in(self.fp8_names, names) or _are_all_in(self.integers, names[:1])


def _are_all_in(known: Collection[str], names: list[list[str]]) -> bool:
    return bool(names) and all(name in known for parts in names for name in parts)
