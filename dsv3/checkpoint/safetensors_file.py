"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import CheckpointError, os_errors_as

# The format's dtypes, whether this project computes with them or not.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # values that share bytes
_KNOWN_DTYPES = DTYPE_BYTES.keys() | _DTYPE_BITS.keys()
MAX_HEADER = 100_000_000  # what the reference implementation accepts


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a contiguous tensor."""
    if dtype in _DTYPE_BITS:
        return -(-math.prod(shape) * _DTYPE_BITS[dtype] // 8)
    return math.prod(shape) * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: `prefix` is all its bytes before the tensors."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    prefix: bytes
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read where each tensor of a file lies.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    with os_errors_as(CheckpointError, f"{path}: cannot be read"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated within its header "
                f"({size} bytes); fetch it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    prefix = length.to_bytes(8, "little") + text
    entries = {name: _entry(path, name, item, len(prefix)) for name, item in header.items()}
    end = max((entry.offset + entry.num_bytes for entry in entries.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, its header tells of {end}; fetch it again"
        )
    return Header(entries, metadata, prefix, size)


def _entry(path: Path, name: str, item: object, base: int) -> Entry:
    try:
        assert isinstance(item, dict)
        start, stop = item["data_offsets"]
        if isinstance(item["dtype"], str) and item["dtype"] not in _KNOWN_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is {item['dtype']}, which is not read")
        entry = Entry(item["dtype"], tuple(item["shape"]), base + start)
        if entry.num_bytes == stop - start and start >= 0:
            return entry
    except (AssertionError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{path}: the header's entry for tensor {name} is damaged: {item}")


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Lay out a file.

    Wide elements come first, so that each tensor is aligned; otherwise the order given is kept.

    Args:
        tensors: (name, dtype, shape) of each.
        metadata: the file's own notes, beside the "format" that loaders look for.

    Returns:
        the bytes the file begins with, and each tensor's offset in the file, in file order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor[1]]):
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"a file of {len(starts)} tensors needs too large a header")
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: len(prefix) + start for name, start in starts.items()}
