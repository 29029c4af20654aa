"""Rank 0's index of the disk tier: pages that can be read, and files to delete for space."""

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
# Limit of the copies in memory that wait to be written; pages beyond it are not stored.
_BACKLOG_BYTES = 1 << 28
# Unfinished files older than this belong to a run that was killed.
_STALE_SECONDS = 600
_CATCH_UP_SECONDS = 30


class DiskIndex:
    """The files of a directory, shared by all models and formats, least recently used first.

    Several runs may share the directory: each counts the files it found at the start and its own
    writes towards the limit, and treats a file deleted by another run as unreadable.

    Args:
        root: the directory.
        limit: bytes of all files together.
        fmt: the format of this run's files.
        files: writes and reads them.

    Attributes:
        num_bytes: bytes of all files, including those being written.
        num_written: files that this run has completed.
    """

    def __init__(self, root: Path, limit: int, fmt: UnitFormat, files: DiskFiles) -> None:
        self._limit = limit
        self._fmt = fmt
        self._files = files
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        # Hashes of the complete files of this run's format, and of the files being written.
        self._units: set[bytes] = set()
        self._writing: set[bytes] = set()
        self.num_bytes = 0
        self.num_written = 0
        self._own = root / fmt.key.hex()
        self._scan(root)
        self._make_room(0)

    def __contains__(self, units: tuple[bytes, ...]) -> bool:
        return self._units.issuperset(units)

    def describe(self) -> str:
        """Return a one-line summary: directory, bytes used, pages."""
        return (
            f"disk cache {self._own.parent}: {self.num_bytes:,} of {self._limit:,} bytes used, "
            f"{len(self._units):,} pages of this model and format"
        )

    def accept(self, units: tuple[bytes, ...]) -> bool:
        """Make room for a page and return True; return False if it shall not be written.

        Pages are refused that are on disk already, or while the backlog of writes is too large.
        """
        new = [unit for unit in units if unit not in self._units and unit not in self._writing]
        num_bytes = len(new) * self._fmt.file_bytes
        backlog = len(self._writing) * self._fmt.file_bytes
        if not new or not self._files.is_writable or num_bytes > self._limit:
            return False
        if self._writing and backlog + num_bytes > min(_BACKLOG_BYTES, self._limit):
            return False
        self._make_room(num_bytes)
        self._writing.update(new)
        self.num_bytes += num_bytes
        return True

    def touch(self, units: tuple[bytes, ...]) -> None:
        """Mark a page as the most recently used."""
        for unit in units:
            if unit in self._units:
                self._sizes.move_to_end(self._files.path(unit))

    def discard(self, units: tuple[bytes, ...]) -> None:
        """Delete the files of a page that could not be read, unless they are gone already."""
        for unit in units:
            if unit in self._units:
                self._reject(self._files.path(unit))

    def is_read(self, page: int) -> bool:
        """Return True if this rank has finished reading a page."""
        return self._files.is_read(page)

    def catch_up(self) -> None:
        """Wait until all queued files are written, for at most 30 seconds."""
        wait([done for _, done in self._files.writes], _CATCH_UP_SECONDS)
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
        """Add the files that were completed since the last call to the index."""
        writes = self._files.writes
        while writes and writes[0][1].done():
            unit, done = writes.popleft()
            if unit not in self._writing:  # on disk already; written again with its page
                continue
            self._writing.remove(unit)
            self.num_bytes -= self._fmt.file_bytes
            if done.result():
                self._add(self._files.path(unit), self._fmt.file_bytes)
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
        self._files.remove(path)
