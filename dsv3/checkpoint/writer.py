"""The weight files of a conversion while they are being written, under temporary names."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from dsv3.checkpoint.blocks import Bytes
from dsv3.checkpoint.digest import Digest
from dsv3.checkpoint.plan import Output, OutputFile, Slot
from dsv3.checkpoint.region import Box, whole
from dsv3.checkpoint.safetensors_file import DTYPE_BYTES
from dsv3.errors import CheckpointError, os_errors_as

PARTIAL = ".partial"

Digests = tuple[str, ...]
"""Of a whole output tensor, then of each of its slots."""


class OutputFiles(AbstractContextManager["OutputFiles"]):
    """The files of a plan, open for writing at any place from any thread."""

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self._partial = [folder / (file.name + PARTIAL) for file in files]
        self._files = files
        self._descriptors: list[int] = []

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def reusable(self) -> bool:
        """Return True if every file is there in full length, and under no other name."""
        found = [path.stat() if path.is_file() else None for path in self._partial]
        return all(
            status is not None and (status.st_size, status.st_nlink) == (file.num_bytes, 1)
            for status, file in zip(found, self._files, strict=True)
        )

    def open(self, reuse: bool) -> None:
        """Open or create all files, with their headers.

        Args:
            reuse: go on with the ones that are there. Else there must be none.
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
        """Write bytes into a file and let the disk begin with them."""
        descriptor, done = self._descriptors[index], 0
        with os_errors_as(CheckpointError, f"{self._partial[index]}: cannot be written"):
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
            if hasattr(os, "posix_fadvise"):
                # Starts write-back now; dirty pages themselves stay. Else it waits for the sync.
                os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)

    def sign(self, model_digest: str) -> None:
        """Put the model's digest into the headers."""
        for index, file in enumerate(self._files):
            self.write(index, 0, file.signed(model_digest))

    def sync(self) -> None:
        """Wait until all that was written is on disk."""
        for path, descriptor in zip(self._partial, self._descriptors, strict=True):
            with os_errors_as(CheckpointError, f"{path}: cannot be written"):
                os.fdatasync(descriptor)


class Spreader:
    """Cuts the row blocks of one output tensor into its slots; equal ones are digested once."""

    def __init__(self, output: Output, files: OutputFiles) -> None:
        itemsize = DTYPE_BYTES[output.dtype]
        self._files = files
        self._whole = Box.of(whole(output.shape), itemsize)
        self._boxes = [Box.of(slot.region, itemsize) for slot in output.slots]
        self._digests = {box: Digest() for box in (self._whole, *self._boxes)}
        self._slots: dict[Box, list[Slot]] = {}
        for slot, box in zip(output.slots, self._boxes, strict=True):
            self._slots.setdefault(box, []).append(slot)

    def put(self, row: int, block: Bytes) -> None:
        """Take the rows that begin at `row`; they come in order."""
        self._digests[self._whole].update(block.data.cast("B"))
        for box, slots in self._slots.items():
            start, stop = max(row, box.row), min(row + len(block), box.row_stop)
            if start >= stop or box.empty:
                continue
            part = np.ascontiguousarray(block[start - row : stop - row, box.col : box.col_stop])
            data = part.data.cast("B")
            if box != self._whole:
                self._digests[box].update(data)
            for slot in slots:
                self._files.write(slot.file, slot.offset + (start - box.row) * part.shape[1], data)

    def digests(self) -> Digests:
        """Of the tensor and of each slot, after the last row."""
        return tuple(str(self._digests[box]) for box in (self._whole, *self._boxes))
