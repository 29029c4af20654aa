"""The disk tier's files: one per unit of 64 cached positions, written and read by all ranks.

The folder is named after model and format, the file after the hash of all tokens up to its last
one, so a file does not depend on the number of ranks that wrote it. File format:

    header     magic, the folder's key, the unit's hash, CRC-32 of these
    segments   smallest parts that a single rank can own: a position, [layers, entry] for each plane
               of the cache, or a head of an expanded cache, [layers, 64 positions, entry]
    checksums  CRC-32 of each segment, seeded with the unit's hash and the segment's index

A rank writes its segments, then their checksums, into a temporary file. The first rank polls until
all checksums are present, writes the header and renames the file. So ranks need no messages to
synchronize, an unfinished file is never found, and every byte is covered by a CRC. Token ids are
not stored, only their hash: the cache directory contains no text of the conversations.
"""

import contextlib
import logging
import math
import os
import re
import stat
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv3.cache.layout import CacheLayout
from dsv3.config import ModelConfig

log = logging.getLogger(__name__)

UNIT = 64  # positions of a file
PENDING, GOOD, BAD = range(3)  # states of a read
_MAGIC = b"dsv3kv1\n"
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
# Until the first rank gives up waiting for the other ranks' checksums. All ranks write the same
# files in the same order, so they are never far apart.
_CHECKSUM_SECONDS = 20.0
Bytes = NDArray[np.uint8]
# A directory of a format; its files: units, unfinished units, and the set-up's probe files.
_FOLDER = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}(\.kv|\.\w+\.tmp)|[0-9a-f]{16}\.tmp")


def is_own(path: Path) -> bool:
    """Return True if name, folder and first bytes of a file are those of a disk cache.

    The header is written last, so an unfinished or truncated file begins with zeros or is short.
    """
    if not (_FOLDER.fullmatch(path.parent.name) and _FILE.fullmatch(path.name)):
        return False
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
    except OSError:
        return False
    return len(begin) < len(_MAGIC) or begin in (_MAGIC, bytes(len(_MAGIC)))


def remove_own(path: Path) -> None:
    """Delete a file if it belongs to a disk cache; else log a warning."""
    if is_own(path):
        path.unlink(missing_ok=True)
    elif os.path.lexists(path):
        log.warning("%s: not a file of a disk cache; not deleted", path)


@dataclass(frozen=True, slots=True)
class UnitFormat:
    """Layout of a unit's file; the same at every world size.

    Attributes:
        key: 16-byte digest of model and format.
        num_segments: segments of a file.
        segment_bytes: bytes of a segment.
    """

    key: bytes
    num_segments: int
    segment_bytes: int

    @classmethod
    def make(cls, model: bytes, config: ModelConfig, layout: CacheLayout) -> "UnitFormat":
        """Return the format of a model's cache.

        Args:
            model: digest of the model's weights.
            config: the model.
            layout: any rank's cache.
        """
        num_segments = UNIT
        segment_bytes = layout.position_bytes
        if layout.form == "heads":
            num_segments = config.num_attention_heads
            values_per_head = config.qk_head_dim + config.v_head_dim
            segment_bytes = segment_bytes * UNIT * values_per_head // layout.main.width
        planes = " ".join(f"{plane.name} {plane.dtype}" for plane in layout.planes)
        description = f"{planes} {num_segments} {segment_bytes}"
        key = blake2b(model + description.encode(), digest_size=16).digest()
        return cls(key, num_segments, segment_bytes)

    def header(self, unit: bytes) -> bytes:
        """Return the header of a unit's file."""
        head = _MAGIC + self.key + unit
        return head + zlib.crc32(head).to_bytes(4, "little")

    def checksum(self, unit: bytes, segment: int, data: memoryview) -> bytes:
        """Return a segment's checksum, 4 bytes. Never zero, which stands for "not written yet"."""
        seed = zlib.crc32(unit + segment.to_bytes(4, "little"))
        return (zlib.crc32(data, seed) or 1).to_bytes(4, "little")

    def segment_offset(self, segment: int) -> int:
        """Return a segment's byte offset; `num_segments` gives the end of the last segment."""
        return len(self.header(bytes(16))) + segment * self.segment_bytes

    def checksum_offset(self, segment: int) -> int:
        """Return the offset of a segment's checksum; `num_segments` gives the end of the file."""
        return self.segment_offset(self.num_segments) + 4 * segment

    @property
    def file_bytes(self) -> int:
        """Bytes of a file."""
        return self.checksum_offset(self.num_segments)


class UnitShard:
    """A rank's part of every unit.

    Args:
        config: the model.
        layout: the rank's cache.
        rank: the rank in its tp group.
    """

    def __init__(self, config: ModelConfig, layout: CacheLayout, rank: int) -> None:
        self._layout = layout
        self._heads: range | None = None
        if layout.form == "heads":
            assert len(layout.planes) == 1, f"{layout.planes=}: only heads are shared out"
            num_heads = layout.main.width // (config.qk_head_dim + config.v_head_dim)
            self._heads = range(rank * num_heads, (rank + 1) * num_heads)
        # A replicated cache is written by the first rank alone.
        self.writes = self._heads is not None or layout.paging.shards > 1 or rank == 0
        self.is_first = rank == 0

    def segments(self, index: int) -> range:
        """Return this rank's segments of a page's unit `index`."""
        if self._heads is not None:
            return self._heads
        paging = self._layout.paging
        return range((paging.shard - index * UNIT) % paging.shards, UNIT, paging.shards)

    def load(self, page: Bytes, index: int) -> Bytes:
        """Return a copy of this rank's segments of a page's unit `index`.

        Args:
            page: [page_bytes], as `CachePool.read_pages` returns it.
            index: of the unit in its page.

        Returns:
            [segments, segment_bytes].
        """
        fields = self._fields(page, index)
        rows = [field.reshape(len(field), math.prod(field.shape[1:])) for field in fields]
        return np.concatenate(rows, axis=1)

    def save(self, page: Bytes, index: int, rows: Bytes) -> None:
        """Copy segments, as `load` returns them, to a page."""
        start = 0
        for field in self._fields(page, index):
            stop = start + math.prod(field.shape[1:])
            field[...] = rows[:, start:stop].reshape(field.shape)
            start = stop

    def _fields(self, page: Bytes, index: int) -> Iterator[Bytes]:
        """Yield views of a unit's fields in a page, [segments, layers, ...]."""
        for field in self._layout.fields(page):
            if self._heads is not None:
                rows = field[:, index * UNIT : (index + 1) * UNIT]
                by_head = rows.reshape(*rows.shape[:2], len(self._heads), -1)
                yield by_head.transpose(2, 0, 1, 3)
            else:
                segments = self.segments(index)
                first = (index * UNIT + segments.start) // self._layout.paging.shards
                yield field[:, first : first + len(segments)].transpose(1, 0, 2)


class DiskFiles:
    """Writes and reads this rank's segments on background threads.

    Args:
        folder: of the model and format; must exist.
        session: part of the names of this run's unfinished files; the same on all ranks, unique
            to this run.
        fmt: the format.
        shard: this rank's part of it.
        pages: [pages, page_bytes], the memory of the host tier.

    Attributes:
        writes: units being written, in order; the future is True once the file is complete. On
            the first rank only.
        is_writable: False after the first file that could not be written.
    """

    def __init__(
        self, folder: Path, session: str, fmt: UnitFormat, shard: UnitShard, pages: Bytes
    ) -> None:
        self._folder = folder
        self._session = session
        self._fmt = fmt
        self._shard = shard
        self._pages = pages
        self._reads: dict[int, Future[bool]] = {}
        self.writes: deque[tuple[bytes, Future[bool]]] = deque()
        self.is_writable = True
        self._writer = ThreadPoolExecutor(1, "kv-disk-writer")
        self._reader = ThreadPoolExecutor(2, "kv-disk-reader")

    def path(self, unit: bytes) -> Path:
        """Return the path of a unit's file."""
        return self._folder / f"{unit.hex()}.kv"

    def store(self, page: int, units: tuple[bytes, ...]) -> None:
        """Write the page of host memory in the background; its data is copied first."""
        if not self._shard.writes:
            return
        for index, unit in enumerate(units):
            segments = self._shard.segments(index)
            rows = self._shard.load(self._pages[page], index)
            done = self._writer.submit(self._write, unit, segments, rows)
            if self._shard.is_first:
                self.writes.append((unit, done))

    def remove(self, path: Path) -> None:
        """Delete a file in the background, after all writes that are queued."""
        self._writer.submit(remove_own, path)

    def fetch(self, page: int, units: tuple[bytes, ...]) -> None:
        """Read a page of host memory in the background."""
        self._reads[page] = self._reader.submit(self._read, page, units)

    def is_read(self, page: int) -> bool:
        """Return True if this rank has finished reading a page."""
        return page in self._reads and self._reads[page].done()

    def outcomes(self, pages: list[int], seconds: float) -> list[int]:
        """Return PENDING, GOOD or BAD for each page's read, after waiting at most `seconds`."""
        reads = [self._reads[page] for page in pages]
        wait(reads, seconds)
        return [_outcome(read) for read in reads]

    def forget(self, page: int) -> None:
        """Drop a read that all ranks have finished."""
        del self._reads[page]

    def _write(self, unit: bytes, segments: range, rows: Bytes) -> bool:
        if not self.is_writable:
            return False
        path = self._folder / f"{unit.hex()}.{self._session}.tmp"
        try:
            file = os.open(path, _FLAGS | os.O_CREAT, 0o644)
            try:
                for segment, row in zip(segments, rows, strict=True):
                    _write_at(file, row.data, self._fmt.segment_offset(segment))
                for segment, row in zip(segments, rows, strict=True):
                    checksum = self._fmt.checksum(unit, segment, row.data)
                    _write_at(file, checksum, self._fmt.checksum_offset(segment))
            finally:
                os.close(file)
            return not self._shard.is_first or self._publish(path, unit)
        except OSError as error:
            self.is_writable = False
            with contextlib.suppress(OSError):
                remove_own(path)
            log.warning("%s: cannot be written (%s); the disk cache is now read-only", path, error)
            return False

    def _publish(self, path: Path, unit: bytes) -> bool:
        """Rename a file that all ranks have written to; return False if the name is taken.

        Raises:
            OSError: another rank has not written its segments in time.
        """
        fmt = self._fmt
        deadline = time.monotonic() + _CHECKSUM_SECONDS
        while True:
            # Opened again each time, so that a network file system shows the other ranks' writes.
            with os.fdopen(os.open(path, _FLAGS), "r+b", buffering=0) as file:
                checksums = os.pread(file.fileno(), 4 * fmt.num_segments, fmt.checksum_offset(0))
                written = np.frombuffer(checksums[: len(checksums) // 4 * 4], np.uint32)
                if len(written) == fmt.num_segments and written.all():
                    _write_at(file.fileno(), fmt.header(unit), 0)
                    break
            if time.monotonic() > deadline:
                raise TimeoutError("another rank has not written its part")
            time.sleep(0.001)
        target = self.path(unit)
        if os.path.lexists(target) and not is_own(target):
            log.warning("%s: not a file of a disk cache; this page is not kept", target)
            remove_own(path)
            return False
        path.replace(target)
        return True

    def _read(self, page: int, units: tuple[bytes, ...]) -> bool:
        return all(self._read_unit(page, index, unit) for index, unit in enumerate(units))

    def _read_unit(self, page: int, index: int, unit: bytes) -> bool:
        fmt = self._fmt
        segments = self._shard.segments(index)
        rows = np.empty((len(segments), fmt.segment_bytes), np.uint8)
        try:
            with self.path(unit).open("rb", buffering=0) as file:
                number = file.fileno()
                header = fmt.header(unit)
                if os.fstat(number).st_size != fmt.file_bytes or file.read(len(header)) != header:
                    return False
                for segment, row in zip(segments, rows, strict=True):
                    num_read = os.preadv(number, [row.data], fmt.segment_offset(segment))
                    checksum = os.pread(number, 4, fmt.checksum_offset(segment))
                    if num_read != len(row) or checksum != fmt.checksum(unit, segment, row.data):
                        return False
                if self._shard.is_first:
                    with contextlib.suppress(PermissionError):  # another user's file
                        os.utime(number)
        except OSError:
            return False
        self._shard.save(self._pages[page], index, rows)
        return True


def _outcome(read: Future[bool]) -> int:
    if not read.done():
        return PENDING
    return GOOD if read.result() else BAD


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    if os.pwrite(file, data, offset) != len(data):
        raise OSError("the disk is full")
