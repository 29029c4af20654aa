"""The weight files of a conversion while they are being written, under temporary names."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from dsv3.checkpoint.blocks import Bytes
from dsv3.checkpoint.digest import Digest
from dsv3.checkpoint.plan import Output, OutputFile, OutputSlice
from dsv3.checkpoint.region import Box, whole
from dsv3.checkpoint.safetensors_file import DTYPE_BYTES
from dsv3.errors import CheckpointError, os_errors_as

PARTIAL = ".partial"

Digests = tuple[str, ...]
"""Digests of a whole output tensor, then of each of its slices."""


class OutputFiles(AbstractContextManager["OutputFiles"]):
    """The files of a plan, open for writing at any offset from any thread."""

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self._partial = [folder / (file.name + PARTIAL) for file in files]
        self._files = files
        self._descriptors: list[int] = []

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def reusable(self) -> bool:
        """Return True if every file exists in full length and has no second hard link."""
        found = [path.stat() if path.is_file() else None for path in self._partial]
        return all(
            status is not None and (status.st_size, status.st_nlink) == (file.num_bytes, 1)
            for status, file in zip(found, self._files, strict=True)
        )

    def open(self, reuse: bool) -> None:
        """Open or create all files, with their headers.

        Args:
            reuse: open existing files; otherwise create them, and fail if one exists.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= 0 if reuse else os.O_CREAT | os.O_EXCL
        for index, file in enumerate(self._files):
            path = self._partial[index]
            with os_errors_as(CheckpointError, f"{path}: cannot be made"):
                descriptor = os.open(path, flags, 0o644)
                self._descriptors.append(descriptor)
                os.ftruncate(descriptor, file.num_bytes)
            self.write(index, 0, file.prefix)

    def write(self, index: int, offset: int, data: memoryview | bytes) -> None:
        """Write bytes into a file and start their write-back."""
        descriptor = self._descriptors[index]
        done = 0
        with os_errors_as(CheckpointError, f"{self._partial[index]}: cannot be written"):
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
            if hasattr(os, "posix_fadvise"):
                # Starts write-back now instead of at the sync; dirty pages stay in memory.
                os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)

    def sign(self, model_digest: str) -> None:
        """Write the model's digest into the headers."""
        for index, file in enumerate(self._files):
            self.write(index, 0, file.signed(model_digest))

    def sync(self) -> None:
        """Wait until all written bytes are on disk."""
        for path, descriptor in zip(self._partial, self._descriptors, strict=True):
            with os_errors_as(CheckpointError, f"{path}: cannot be written"):
                os.fdatasync(descriptor)


class TensorWriter:
    """Writer of one output tensor: cuts row blocks into slices, and digests equal slices once."""

    def __init__(self, output: Output, files: OutputFiles) -> None:
        itemsize = DTYPE_BYTES[output.dtype]
        self._files = files
        self._whole = Box.of(whole(output.shape), itemsize)
        self._boxes = [Box.of(part.region, itemsize) for part in output.slices]
        self._digests = {box: Digest() for box in (self._whole, *self._boxes)}
        self._slices: dict[Box, list[OutputSlice]] = {}
        for part, box in zip(output.slices, self._boxes, strict=True):
            self._slices.setdefault(box, []).append(part)

    def put(self, row: int, block: Bytes) -> None:
        """Write the rows that begin at `row`; blocks must arrive in row order."""
        self._digests[self._whole].update(block.data.cast("B"))
        for box, slices in self._slices.items():
            start = max(row, box.row)
            stop = min(row + len(block), box.row_stop)
            if start >= stop or box.is_empty:
                continue
            rows = np.ascontiguousarray(block[start - row : stop - row, box.col : box.col_stop])
            data = rows.data.cast("B")
            if box != self._whole:
                self._digests[box].update(data)
            for part in slices:
                self._files.write(part.file, part.offset + (start - box.row) * rows.shape[1], data)

    def digests(self) -> Digests:
        """Return the digests of the tensor and of each slice; call it after the last row."""
        return tuple(str(self._digests[box]) for box in (self._whole, *self._boxes))
