"""Weights stored as integers of 4 or 8 bits: their tensors, and the slices of these.

A weight `X.weight`, [F, D], with a scale per group of columns of each row is stored in one of three
layouts. In all of them, value = (integer - zero) * scale.

- PLAIN, of compressed-tensors ("int-quantized"): `X.weight` int8 [F, D] and `X.weight_scale`
  [F, D / group].
- PACKED, of compressed-tensors ("pack-quantized") and Kimi-K2-Thinking: `X.weight_packed`
  int32 [F, D * bits / 32], the first integer in the lowest bits, plus 2^(bits-1); `X.weight_scale`
  [F, D / group]; `X.weight_shape` holds F and D.
- AWQ: `X.qweight` int32 [D, F / 8], `X.qzeros` int32 [D / group, F / 8], `X.scales`
  [D / group, F]. An int32 holds eight rows of W, in the order 0 2 4 6 1 3 5 7.

Source: compressed-tensors 0.20, pack_quantized.py; AutoAWQ 0.2, packing_utils.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dsv3.checkpoint.reader import Source, TensorInfo
from dsv3.checkpoint.region import Region, whole
from dsv3.config_integers import IntegerKind
from dsv3.errors import CheckpointError

INTEGER_SCALES = ("BF16", "F16", "F32")


class Layout(Enum):
    """Names and arrangement of the tensors of a weight; the value lists their suffixes."""

    PLAIN = (".weight", ".weight_scale")
    PACKED = (".weight_packed", ".weight_scale", ".weight_shape")
    AWQ = (".qweight", ".qzeros", ".scales")


@dataclass(frozen=True, slots=True)
class IntegerForm:
    """How one weight is stored.

    Attributes:
        kind: width, and columns that share a scale, also for a whole row.
        layout: of its tensors.
    """

    kind: IntegerKind
    layout: Layout

    def names(self, weight: str) -> tuple[str, ...]:
        """Return the names of a weight's tensors, the integers first."""
        stem = weight.removesuffix(".weight")
        return tuple(stem + suffix for suffix in self.layout.value)

    def scale_name(self, weight: str) -> str:
        """Return the name of the tensor of a weight's scales."""
        return self.names(weight)[2 if self.layout is Layout.AWQ else 1]

    def types(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
        """Return the possible dtypes, and the shape, of each tensor of a weight of `shape`."""
        rows, cols = shape
        groups = cols // self.kind.group
        if self.layout is Layout.PLAIN:
            return (("I8",), (rows, cols)), (INTEGER_SCALES, (rows, groups))
        if self.layout is Layout.PACKED:
            packed = ("I32",), (rows, cols * self.kind.bits // 32)
            return packed, (INTEGER_SCALES, (rows, groups)), (("I64", "I32"), (2,))
        integers = ("I32",), (cols, rows // 8)
        return integers, (("I32",), (groups, rows // 8)), (INTEGER_SCALES, (groups, rows))


def integer_form(
    tensors: Mapping[str, TensorInfo], weight: str, shape: tuple[int, ...]
) -> IntegerForm | None:
    """Return how a weight of `shape` is stored; None if it is not stored as integers.

    The shapes of the tensors tell bits and group; `check_integers` checks them.
    """
    stem = weight.removesuffix(".weight")
    if not weight.endswith(".weight") or len(shape) != 2:
        return None
    if (info := tensors.get(weight)) is not None:
        if info.dtype != "I8":
            return None
        group = _group(tensors, f"{stem}.weight_scale", 1, shape[1])
        return IntegerForm(IntegerKind(8, group), Layout.PLAIN)
    if (info := tensors.get(f"{stem}.weight_packed")) is not None:
        group = _group(tensors, f"{stem}.weight_scale", 1, shape[1])
        bits = 8 if len(info.shape) == 2 and info.shape[1] * 4 == shape[1] else 4
        return IntegerForm(IntegerKind(bits, group), Layout.PACKED)
    if f"{stem}.qweight" in tensors:
        group = _group(tensors, f"{stem}.scales", 0, shape[1])
        return IntegerForm(IntegerKind(4, group), Layout.AWQ)
    return None


def _group(tensors: Mapping[str, TensorInfo], scale: str, dim: int, cols: int) -> int:
    """Return the columns per scale; a whole row for a scale that is absent or misshapen."""
    info = tensors.get(scale)
    count = info.shape[dim] if info is not None and len(info.shape) == 2 else 1
    return cols // count if count and cols % count == 0 else cols


def check_integers(
    source: Source, weight: str, shape: tuple[int, ...], form: IntegerForm, may_quantize: bool
) -> None:
    """Raise CheckpointError unless a weight's tensors have the dtypes and shapes of their form."""
    names = form.names(weight)
    present = next(name for name in names if name in source.tensors)
    file = source.file_of(present)
    if not may_quantize:
        raise CheckpointError(
            f"{file}: tensor {present} has integers; of this weight only BF16, F16 and F32 are read"
        )
    unit = {Layout.PLAIN: 1, Layout.PACKED: 32 // form.kind.bits, Layout.AWQ: 8}[form.layout]
    dim, size = ("rows", shape[0]) if form.layout is Layout.AWQ else ("columns", shape[1])
    if size % unit:
        raise CheckpointError(
            f"{file}: tensor {present}: the {size} {dim} of {weight} are not a multiple of the "
            f"{unit} integers in an int32"
        )
    for name in names:
        if name not in source.tensors:
            raise CheckpointError(
                f"{file}: tensor {present} is stored, but {name} is missing; fetch the files again"
            )
    for name, (dtypes, wanted) in zip(names, form.types(shape), strict=True):
        info = source.tensors[name]
        if info.shape != wanted:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name} is {list(info.shape)}; for a weight of "
                f"{list(shape)} in int{form.kind.bits} with a scale per {form.kind.group} columns "
                f"it is {list(wanted)} ({math.prod(wanted)} values)"
            )
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name} is {info.dtype}; it is read as "
                f"{' or '.join(dtypes)}"
            )


def integer_part_region(
    name: str, shape: tuple[int, ...], weight_shape: tuple[int, ...], region: Region
) -> Region:
    """Return the region of one tensor of a weight that covers a region of the weight.

    A group, or an int32, that an edge of the region cuts is covered whole, as FP8 blocks are.

    Args:
        name: of the tensor.
        shape: of the tensor.
        weight_shape: of the weight.
        region: of the weight.
    """
    if name.endswith(".weight_shape"):
        return whole(shape)
    if name.endswith(Layout.AWQ.value):
        weight_shape = weight_shape[::-1]
        region = region[::-1]
    parts = []
    for size, total, (start, stop) in zip(shape, weight_shape, region, strict=True):
        unit = max(1, total // max(1, size))
        first = start // unit
        parts.append((first, -(-stop // unit) if stop > start else first))
    return tuple(parts)
