"""One reader for every kind of checkpoint directory: `Source.read(name, region)`.

Files are read with `preadv` directly into the caller's memory, not mapped: pages of a mapped file
count as resident memory until it is unmapped.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.digest import Digest
from dsv3.checkpoint.region import Box, Region, region_shape, whole
from dsv3.checkpoint.safetensors_file import DTYPE_BYTES, tensor_bytes
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError, os_errors_as
from dsv3.read_files import open_regular

_CALL_BYTES = 16 << 20  # most bytes of one system call, so that progress is visible on a slow disk
_STAGING_BYTES = 8 << 20  # of the buffer for rows from which columns are copied


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous byte range in a file with one region of a tensor, row-major.

    `digest` covers these bytes if there is a manifest; otherwise it is empty.
    """

    file: Path
    offset: int
    region: Region
    digest: str = ""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor and the pieces it can be read from; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    digest: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Version:
    """Size and modification time of a file, to detect a change."""

    size: int
    changed_ns: int


def _version(file: Path | int) -> Version | None:
    """Return the version of a file; None if it does not exist."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return Version(status.st_size, status.st_mtime_ns)


class Source(AbstractContextManager["Source"]):
    """A checkpoint directory that can be read slice by slice, from any number of threads.

    A piece with a digest that is read whole in one call is checked against it.

    Attributes:
        path: the directory.
        config: the model's config, corrected if the stored tensors contradict it.
        tensors: all tensors by Hugging Face name.
        model_digest: digest of all weights if there is a manifest; otherwise empty.
        bytes_read: approximate number of bytes read so far, to report progress.
        declared: the config before corrections, for messages.
        num_unused: number of stored tensors that the text model does not use.
        versions: size and modification time of each file with tensors, when it was opened; None
            for a file of another rank that is not here.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        declared: ModelConfig,
        num_unused: int = 0,
        model_digest: str = "",
    ) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self.declared = declared
        self.num_unused = num_unused
        self.model_digest = model_digest
        self.bytes_read = 0
        files = {piece.file for info in tensors.values() for piece in info.pieces}
        self.versions = {file: _version(file) for file in sorted(files)}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(info.num_bytes for info in self.tensors.values())

    def is_changed(self) -> bool:
        """Return True if a file was replaced since the checkpoint was opened."""
        return any(_version(file) != version for file, version in self.versions.items())

    def file_of(self, name: str) -> Path:
        """Return the file with a tensor's first piece."""
        return self.tensors[name].pieces[0].file

    def read(
        self, name: str, region: Region | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a region of a tensor, row-major and contiguous.

        Args:
            name: Hugging Face name.
            region: region to read; the whole tensor by default.
            out: writable memory of exactly the region's bytes, such as a tensor's; allocated by
                default.

        Returns:
            `out`, as bytes.

        Raises:
            CheckpointError: the tensor does not exist, or a file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        info = self.tensors[name]
        region = whole(info.shape) if region is None else region
        size = tensor_bytes(info.dtype, region_shape(region))
        buffer = memoryview(bytearray(size)) if out is None else out.cast("B")
        assert len(buffer) == size, f"{name}: {len(buffer)=} {size=} {region=}"
        if size:
            self._fill(info, region, buffer)
        return buffer

    def stream(self, info: TensorInfo, piece: Piece, block_bytes: int) -> Iterator[memoryview]:
        """Yield the stored bytes of one piece in blocks of at most `block_bytes`.

        A block is valid until the next one is requested.
        """
        size = tensor_bytes(info.dtype, region_shape(piece.region))
        buffer = memoryview(bytearray(min(block_bytes, size)))
        for start in range(0, size, block_bytes):
            block = buffer[: size - start]
            self._read_bytes(piece.file, piece.offset + start, block)
            yield block

    def _fill(self, info: TensorInfo, region: Region, buffer: memoryview) -> None:
        itemsize = DTYPE_BYTES[info.dtype]
        box = Box.of(region, itemsize)
        target = np.frombuffer(buffer, np.uint8).reshape(-1, box.col_stop - box.col)
        missing = [box]
        for piece in info.pieces:
            if not missing:
                return
            piece_box = Box.of(piece.region, itemsize)
            still_missing: list[Box] = []
            for wanted in missing:
                part = wanted.intersection(piece_box)
                if part.is_empty:
                    still_missing.append(wanted)
                    continue
                still_missing += wanted.minus(part)
                view = target[
                    part.row - box.row : part.row_stop - box.row,
                    part.col - box.col : part.col_stop - box.col,
                ]
                self._read_box(info.name, piece, piece_box, part, view)
            missing = still_missing
        if missing:
            raise CheckpointError(f"{self.path}: tensor {info.name} lacks {list(missing[0])}")

    def _read_box(
        self, name: str, piece: Piece, piece_box: Box, part: Box, view: npt.NDArray[np.uint8]
    ) -> None:
        """Read a part of a piece into `view`; if it is the whole piece, check its digest."""
        width = piece_box.col_stop - piece_box.col
        first = piece.offset + (part.row - piece_box.row) * width
        digest = Digest() if piece.digest and part == piece_box else None
        if view.shape[1] == width and view.flags.c_contiguous:
            self._read_bytes(piece.file, first, view.data.cast("B"))
            if digest:
                digest.update(view.data.cast("B"))
        else:
            rows = max(1, _STAGING_BYTES // width)
            staging = np.empty((min(rows, len(view)), width), np.uint8)
            left = part.col - piece_box.col
            for row in range(0, len(view), rows):
                block = staging[: len(view) - row]
                self._read_bytes(piece.file, first + row * width, block.data.cast("B"))
                view[row : row + rows] = block[:, left : left + view.shape[1]]
                if digest:
                    digest.update(block.data.cast("B"))
        if digest:
            digest.check(piece.digest, piece.file, name, "manifest.json")

    def _read_bytes(self, file: Path, offset: int, out: memoryview) -> None:
        descriptor = self._descriptor(file)
        done = 0
        with os_errors_as(CheckpointError, f"{file}: cannot be read"):
            while done < len(out):
                count = os.preadv(descriptor, [out[done : done + _CALL_BYTES]], offset + done)
                if not count:
                    raise CheckpointError(f"{file}: ends at byte {offset + done}; fetch it again")
                done += count
                self.bytes_read += count

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                if not file.exists():
                    raise CheckpointError(f"{file}: missing, and this rank reads it; copy it here")
                self._files[file] = open_regular(file, CheckpointError)
                self._check_version(file)
            return self._files[file]

    def _check_version(self, file: Path) -> None:
        """Raise CheckpointError if a file has changed since its header was read."""
        old = self.versions[file]
        new = _version(self._files[file])
        if old is None or new is None or old == new:
            return
        if new.size < old.size:
            raise CheckpointError(f"{file}: ends at byte {new.size}, it was longer; fetch it again")
        raise CheckpointError(f"{file}: was changed while the checkpoint was read; start again")
