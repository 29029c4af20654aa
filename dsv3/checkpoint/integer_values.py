"""Values of integer weights, in numpy on any machine: unpack, dequantize, quantize, pack."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.fp8_values import F32, from_bf16, to_bf16
from dsv3.checkpoint.integers import IntegerForm, Layout, integer_part_region
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import Region, region_shape
from dsv3.checkpoint.scales import widen
from dsv3.errors import CheckpointError

I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # rows of W in the four-bit fields of an int32
# Scales that `quantize_rows` tries, as shares of the one that fits the largest value. Below the
# largest value the others are finer; for int4, a scale that is exact for -8 may be coarser.
_SHARES = {4: np.linspace(1.1, 0.55, 23), 8: np.linspace(1.0, 0.85, 6)}


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """A region of an integer weight: value = (q - zero) * scale of its group.

    Attributes:
        q_FD: [F, D].
        scale_Fg: [F, groups] float32, of all groups that the region touches.
        zero_Fg: [F, groups]; None for 0.
        group: columns that share a scale.
        offset: columns of the first group that lie before the region.
    """

    q_FD: I8
    scale_Fg: F32
    zero_Fg: I8 | None
    group: int
    offset: int

    def values(self) -> F32:
        """Return the values, [F, D]."""
        rows, cols = self.q_FD.shape
        q: npt.NDArray[np.float32] = self.q_FD.astype(np.float32)
        if self.zero_Fg is not None:
            q -= self._by_column(self.zero_Fg.astype(np.float32), cols)
        q *= self._by_column(self.scale_Fg, cols)
        return q.reshape(rows, cols)

    def _by_column(self, by_group: F32, cols: int) -> F32:
        if by_group.shape[1] == 1:
            return by_group
        return by_group.repeat(self.group, 1)[:, self.offset : self.offset + cols]


def read_integers(
    source: Source, weight: str, shape: tuple[int, ...], form: IntegerForm, region: Region
) -> IntegerRows:
    """Read a region of an integer weight.

    Args:
        source: a checked checkpoint.
        weight: name of the weight.
        shape: of the weight.
        form: how it is stored.
        region: of the weight.
    """
    names = form.names(weight)
    scale = form.scale_name(weight)
    scale_Fg = widen(_read(source, scale, shape, region), source.tensors[scale].dtype)
    stored = _read(source, names[0], shape, region)
    zero_Fg = None
    if form.layout is Layout.AWQ:
        scale_Fg = np.ascontiguousarray(scale_Fg.T)
        q_FD = _awq_rows(stored, region)
        zero_Fg = _awq_rows(_read(source, names[1], shape, region), region)
    elif form.layout is Layout.PACKED:
        first = region[1][0] % (32 // form.kind.bits)
        q_FD = unpack(stored, form.kind.bits)[:, first : first + region_shape(region)[1]]
    else:
        q_FD = stored.view(np.int8)
    offset = region[1][0] % form.kind.group
    return IntegerRows(q_FD, scale_Fg, zero_Fg, form.kind.group, offset)


def check_stated_shape(
    source: Source, weight: str, shape: tuple[int, ...], form: IntegerForm
) -> None:
    """Raise CheckpointError if the stored `weight_shape` of a weight is not its shape."""
    if form.layout is not Layout.PACKED:
        return
    name = form.names(weight)[2]
    width = np.int64 if source.tensors[name].dtype == "I64" else np.int32
    stated = np.frombuffer(source.read(name), width).tolist()
    if stated != list(shape):
        raise CheckpointError(
            f"{source.file_of(name)}: tensor {name} says {stated}, but the weight is "
            f"{list(shape)}; export it again"
        )


def _read(source: Source, name: str, shape: tuple[int, ...], region: Region) -> U8:
    """Return the bytes of one of a weight's tensors that cover a region of it, row by row."""
    info = source.tensors[name]
    part = integer_part_region(name, info.shape, shape, region)
    stored = np.frombuffer(source.read(name, part), np.uint8)
    rows = region_shape(part)[0]
    return stored.reshape(rows, len(stored) // max(1, rows))


def unpack(packed: U8, bits: int) -> I8:
    """Return the integers of rows of bytes of the PACKED layout."""
    if bits == 8:
        return (packed ^ np.uint8(0x80)).view(np.int8)
    q = np.empty((*packed.shape, 2), np.int8)
    q[..., 0] = packed & 15
    q[..., 1] = packed >> 4
    q -= 8
    return q.reshape(len(packed), 2 * packed.shape[1])


def pack(q_FD: I8, bits: int) -> U8:
    """Return rows of integers as bytes of the PACKED layout."""
    if bits == 8:
        return q_FD.view(np.uint8) ^ np.uint8(0x80)
    codes = (q_FD + np.int8(8)).view(np.uint8)
    packed: U8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def _awq_rows(stored: U8, region: Region) -> I8:
    """Return the rows of W of a region from rows of bytes, [D, F / 2], as [F, D]."""
    fields = np.empty((len(stored), stored.shape[1] // 4, 8), np.uint8)
    by_int32 = stored.reshape(len(stored), stored.shape[1] // 4, 4)
    for i, row in enumerate(_AWQ_ORDER):
        fields[..., row] = by_int32[..., i // 2] >> (i % 2 * 4) & 15
    first, stop = region[0]
    rows = fields.reshape(len(stored), fields.shape[1] * 8)[:, first % 8 : first % 8 + stop - first]
    return np.ascontiguousarray(rows.T).astype(np.int8)


def quantize_rows(x_FD: F32, bits: int, group: int) -> tuple[I8, npt.NDArray[np.uint16]]:
    """Round rows to integers, with the scale per group that makes the squared error least.

    Args:
        x_FD: [F, D], D a multiple of `group`.
        bits: 4 or 8.
        group: columns that share a scale.

    Returns:
        [F, D] integers and [F, D / group] BF16 scales as bits; x is about q * scale.
    """
    most = np.float32(2 ** (bits - 1) - 1)
    x = x_FD.reshape(len(x_FD), -1, group)
    largest = np.abs(x).max(2, keepdims=True)
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_scale = np.ones(largest.shape, np.float32)
    for share in _SHARES[bits]:
        scale = _bf16(np.maximum(largest * np.float32(share / most), np.float32(2.0**-120)))
        error = np.square(_rounded(x, scale, most) * scale - x).sum(2, keepdims=True)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best_scale = np.where(is_better, scale, best_scale)
    best_scale = np.where(largest > 0, best_scale, np.float32(1))
    q = _rounded(x, best_scale, most).astype(np.int8)
    return q.reshape(x_FD.shape), to_bf16(best_scale[..., 0])


def _rounded(x: F32, scale: F32, most: np.float32) -> F32:
    return np.clip(np.rint(x / scale), -most - 1, most)


def _bf16(x: F32) -> F32:
    return from_bf16(to_bf16(x))
