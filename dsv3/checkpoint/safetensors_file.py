"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsv3.errors import CheckpointError, os_errors_as, shorten
from dsv3.read_files import open_regular, parse_json

# All dtypes of the format, including those that this project does not compute with.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # values that share bytes
_KNOWN_DTYPES = DTYPE_BYTES.keys() | _DTYPE_BITS.keys()
MAX_HEADER = 100_000_000  # the limit of the reference implementation
MAX_DIMS = 64  # the limit of torch


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size of a contiguous tensor in bytes."""
    if dtype in _DTYPE_BITS:
        return -(-math.prod(shape) * _DTYPE_BITS[dtype] // 8)
    return math.prod(shape) * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header of a file, and the file's size."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read the header of a file: type, shape and offset of each tensor.

    As in the reference implementation, the tensors must fill the file without gaps or overlaps.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    descriptor = open_regular(path, CheckpointError)
    with os_errors_as(CheckpointError, f"{path}: cannot be read"), open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated within its header "
                f"({size} bytes); fetch it again"
            )
        text = file.read(length)
    header = parse_json(text, f"{path}: its header cannot be read", CheckpointError, True)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a JSON object")
    metadata = _metadata(path, header.pop("__metadata__", None))
    begin = 8 + length
    entries = {name: _entry(path, name, item, begin) for name, item in header.items()}
    _check_layout(path, entries, begin, size)
    return Header(entries, metadata, size)


def _metadata(path: Path, item: object) -> dict[str, str]:
    if item is None:
        return {}
    if isinstance(item, dict) and all(isinstance(value, str) for value in item.values()):
        return item
    raise CheckpointError(f"{path}: the header's __metadata__ is damaged: not texts by name")


def _entry(path: Path, name: str, item: object, base: int) -> Entry:
    try:
        if not isinstance(item, dict):
            raise ValueError("it is not an object")
        dtype, shape, offsets = (item.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str):
            raise ValueError("its dtype is not a name")
        if dtype not in _KNOWN_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is {shorten(dtype)}, which is not read")
        start, stop = _sizes("data_offsets", offsets, 2, 2)
        entry = Entry(dtype, _sizes("shape", shape, 0, MAX_DIMS), base + start)
        if entry.num_bytes != stop - start:
            raise ValueError("its shape and its data_offsets differ in size")
        return entry
    except ValueError as error:
        fault = f"{path}: the header's entry for tensor {name} is damaged: {error}"
        raise CheckpointError(fault) from None


def _sizes(field: str, value: Any, least: int, most: int) -> tuple[int, ...]:
    """Return a list of sizes, checked to fit 63 bits."""
    is_list = isinstance(value, list) and least <= len(value) <= most
    if not is_list or not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise ValueError(f"its {field} is not a list of sizes")
    return tuple(value)


def _check_layout(path: Path, entries: Mapping[str, Entry], begin: int, size: int) -> None:
    """Raise CheckpointError for overlaps, tensors beyond the end, and bytes of no tensor."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    for (before, first), (after, second) in pairwise(ordered):
        if second.offset < first.offset + first.num_bytes:
            raise CheckpointError(f"{path}: tensors {before} and {after} overlap; fetch it again")
    end = max((entry.offset + entry.num_bytes for entry in entries.values()), default=begin)
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, its header needs {end}; fetch it again"
        )
    unused = size - begin - sum(entry.num_bytes for entry in entries.values())
    if unused:
        raise CheckpointError(f"{path}: {unused} bytes belong to no tensor; fetch it again")


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the offset of each tensor in the file, in file order.

    Tensors with wide elements come first, so that each one is aligned; otherwise the given order is
    kept.

    Args:
        tensors: (name, dtype, shape) of each tensor.
        metadata: entries in addition to the "format" that loaders look for.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor[1]]):
        start = end
        end = end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"a file of {len(starts)} tensors needs too large a header")
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: len(prefix) + start for name, start in starts.items()}
