"""Rank 0's list of what is on disk: which pages can be read, which files go when room is needed."""

import logging
import re
import stat
import time
from collections import OrderedDict
from concurrent.futures import wait
from pathlib import Path

from dsv3.cache.disk import DiskFiles, UnitFormat, remove_own

log = logging.getLogger(__name__)

_FOLDER = "[0-9a-f]" * 32
_NAME = re.compile(r"[0-9a-f]{32}\.kv")
# Files may wait to be written for at most so many bytes of memory; more are not kept.
_BACKLOG_BYTES = 1 << 28
# Unfinished files this old belong to a run that was killed.
_STALE_SECONDS = 600
_CATCH_UP_SECONDS = 30


class DiskIndex:
    """The files of a directory, shared by all models and formats, least recently used first.

    Several runs may use it at once: each keeps the limit by what it found and what it writes, and
    takes a file that another one has deleted for an unreadable one.

    Args:
        root: the directory.
        limit: bytes that all files together may take.
        fmt: the format of this run's files.
        files: writes and reads them.

    Attributes:
        num_bytes: of all files, those included that are being written.
    """

    def __init__(self, root: Path, limit: int, fmt: UnitFormat, files: DiskFiles) -> None:
        self._limit, self._fmt, self._disk = limit, fmt, files
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        # Of those, this run's own by their hash; and what is being written.
        self._units: set[bytes] = set()
        self._coming: set[bytes] = set()
        self.num_bytes = self.num_written = 0
        self._own = root / fmt.key.hex()
        self._scan(root)
        self._make_room(0)

    def __contains__(self, units: tuple[bytes, ...]) -> bool:
        return self._units.issuperset(units)

    def describe(self) -> str:
        """Return what there is, in one line."""
        return (
            f"disk cache {self._own.parent}: {self.num_bytes:,} of {self._limit:,} bytes used, "
            f"{len(self._units):,} pages of this model and format"
        )

    def accept(self, units: tuple[bytes, ...]) -> bool:
        """Tell whether to write a page: it is new, and writing keeps up. Makes room for it."""
        new = [unit for unit in units if unit not in self._units and unit not in self._coming]
        num_bytes = len(new) * self._fmt.file_bytes
        backlog = len(self._coming) * self._fmt.file_bytes
        if not new or not self._disk.is_writable or num_bytes > self._limit:
            return False
        if self._coming and backlog + num_bytes > min(_BACKLOG_BYTES, self._limit):
            return False
        self._make_room(num_bytes)
        self._coming.update(new)
        self.num_bytes += num_bytes
        return True

    def touch(self, units: tuple[bytes, ...]) -> None:
        """Note that a page was used."""
        for unit in units:
            if unit in self._units:
                self._sizes.move_to_end(self._disk.path(unit))

    def discard(self, units: tuple[bytes, ...]) -> None:
        """Delete a page that could not be read, unless it had to make room meanwhile."""
        for unit in units:
            if unit in self._units:
                self._reject(self._disk.path(unit))

    def is_read(self, slot: int) -> bool:
        """Tell whether this rank is done reading into a slot."""
        return self._disk.is_read(slot)

    def catch_up(self) -> None:
        """Wait until all files are written, or too long."""
        wait([done for _, done in self._disk.writes], _CATCH_UP_SECONDS)
        self.note_written()

    def _scan(self, root: Path) -> None:
        found = []
        for path in root.glob(f"{_FOLDER}/*"):
            try:
                status = path.lstat()
                if path.suffix == ".tmp" and status.st_mtime < time.time() - _STALE_SECONDS:
                    remove_own(path)
                elif _NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime, path, status.st_size))
            except OSError:  # another run has just deleted it
                continue
        for _, path, size in sorted(found):
            self._add(path, size)
            if path.parent == self._own and size != self._fmt.file_bytes:
                self._reject(path)

    def _add(self, path: Path, size: int) -> None:
        self._sizes[path] = size
        self.num_bytes += size
        if path.parent == self._own:
            self._units.add(bytes.fromhex(path.stem))

    def note_written(self) -> None:
        """Find from now on what has been written meanwhile."""
        writes = self._disk.writes
        while writes and writes[0][1].done():
            unit, done = writes.popleft()
            if unit not in self._coming:  # a neighbour in its page was new, it was not
                continue
            self._coming.remove(unit)
            self.num_bytes -= self._fmt.file_bytes
            if done.result():
                self._add(self._disk.path(unit), self._fmt.file_bytes)
                self.num_written += 1

    def _make_room(self, num_bytes: int) -> None:
        while self._sizes and self.num_bytes + num_bytes > self._limit:
            self._remove(next(iter(self._sizes)))

    def _reject(self, path: Path) -> None:
        log.warning("%s: damaged, foreign or unreadable; ignored and deleted", path)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        self.num_bytes -= self._sizes.pop(path)
        if path.parent == self._own:
            self._units.remove(bytes.fromhex(path.stem))
        self._disk.remove(path)
