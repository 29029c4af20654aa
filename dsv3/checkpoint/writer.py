"""The output files of a conversion while they are being written, and the journal of what is done.

Files carry a temporary name until all of them are complete and on disk. The journal lists finished
tensors with their digests; a line is written only after the tensor's bytes are on disk, so that a
conversion killed at any moment goes on from its journal.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
JOURNAL = ".convert.journal"
COMMIT_BYTES = 256 << 20  # work that a kill may cost

Digests = tuple[str, ...]
"""Of a whole output tensor, then of each of its slots."""


class OutputFiles(AbstractContextManager["OutputFiles"]):
    """The files of a plan, open for writing at any place from any thread."""

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self._final = [folder / file.name for file in files]
        self._partial = [folder / (file.name + PARTIAL) for file in files]
        self._files = files
        self._descriptors: list[int] = []

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def reusable(self) -> bool:
        """Whether every file is there, under either name and in full length."""
        return all(
            any(path.is_file() and path.stat().st_size == file.num_bytes for path in paths)
            for *paths, file in zip(self._partial, self._final, self._files, strict=True)
        )

    def open(self, reuse: bool) -> None:
        """Open or create all temporary files, with their headers.

        Args:
            reuse: go on with what is there, even if some files have their final name already.
        """
        for index, file in enumerate(self._files):
            path = self._partial[index]
            if reuse and not path.exists():
                path = self._final[index]
            with os_errors_as(CheckpointError, f"{path}: cannot be made"):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def publish(self) -> None:
        """Give complete files their names."""
        for partial, final in zip(self._partial, self._final, strict=True):
            if partial.exists():
                partial.replace(final)


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


class Journal(AbstractContextManager["Journal"]):
    """What is finished of a conversion, on disk. Only one process may hold it."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / JOURNAL
        self._head = json.dumps({"plan": fingerprint})
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._pool = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise CheckpointError(f"{folder}: another conversion is writing here") from None

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._file.close()

    def read(self) -> dict[str, Digests] | None:
        """Finished tensors; None if there is no journal of this very plan."""
        self._file.seek(0)
        text = self._file.read()
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines or lines[0] != self._head:
            return None
        if not text.endswith("\n"):  # torn while it was written
            self._file.truncate(text.rfind("\n") + 1)
        return {name: tuple(digests) for name, digests in map(json.loads, lines[1:])}

    def restart(self) -> None:
        """Forget everything; begin with this plan."""
        self._file.truncate(0)
        self._append([self._head])

    def add(self, name: str, digests: Digests, num_bytes: int, files: OutputFiles) -> None:
        """Note a finished tensor; commit in the background once enough has come together."""
        self._pending.append(json.dumps([name, digests]))
        self._pending_bytes += num_bytes
        idle = self._commit is None or self._commit.done()
        if self._pending_bytes >= COMMIT_BYTES and idle:
            self._wait()
            self._commit = self._pool.submit(self._sync_and_append, files, self._pending)
            self._pending, self._pending_bytes = [], 0

    def flush(self, files: OutputFiles) -> None:
        """Wait until everything noted is on disk."""
        self._wait()
        self._sync_and_append(files, self._pending)
        self._pending, self._pending_bytes = [], 0

    def _wait(self) -> None:
        if self._commit is not None:
            self._commit.result()

    def _sync_and_append(self, files: OutputFiles, lines: list[str]) -> None:
        files.sync()
        self._append(lines)

    def _append(self, lines: Iterable[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
