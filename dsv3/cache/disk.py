"""The disk tier's files: one per unit of 64 cached positions, written and read by all ranks.

The folder is named after model and format, the file after the hash of all tokens up to its last
one, so a file does not depend on the number of ranks that wrote it. File format:

    header     magic, the folder's key, the unit's hash, CRC-32 of these
    lanes      smallest pieces that a single rank can own: a position of a latent cache,
               [layers, entry], or a head of an expanded cache, [layers, 64 positions, entry]
    checksums  CRC-32 of each lane, seeded with the unit's hash and the lane's index

A rank writes its lanes, then their checksums, into a temporary file. The first rank polls until all
checksums are present, writes the header and renames the file. So ranks need no messages to
synchronize, an unfinished file is never found, and every byte is covered by a CRC. Token ids are
not stored, only their hash: the cache directory contains no text of the conversations.
"""

import contextlib
import logging
import os
import re
import stat
import time
import zlib
from collections import deque
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
        num_lanes: lanes of a file.
        lane_bytes: bytes of a lane.
    """

    key: bytes
    num_lanes: int
    lane_bytes: int

    @classmethod
    def make(cls, model: bytes, config: ModelConfig, layout: CacheLayout) -> "UnitFormat":
        """Return the format of a model's cache.

        Args:
            model: digest of the model's weights.
            config: the model.
            layout: any rank's cache.
        """
        num_lanes = UNIT
        lane_bytes = config.num_hidden_layers * layout.entry_bytes
        if layout.form == "heads":
            num_lanes = config.num_attention_heads
            values_per_head = config.qk_head_dim + config.v_head_dim
            lane_bytes = lane_bytes * UNIT * values_per_head // layout.width
        description = f"{layout.form} {layout.dtype} {num_lanes} {lane_bytes}"
        key = blake2b(model + description.encode(), digest_size=16).digest()
        return cls(key, num_lanes, lane_bytes)

    def header(self, unit: bytes) -> bytes:
        """Return the header of a unit's file."""
        head = _MAGIC + self.key + unit
        return head + zlib.crc32(head).to_bytes(4, "little")

    def checksum(self, unit: bytes, lane: int, data: memoryview) -> bytes:
        """Return a lane's checksum, 4 bytes. Never zero, which stands for "not written yet"."""
        seed = zlib.crc32(unit + lane.to_bytes(4, "little"))
        return (zlib.crc32(data, seed) or 1).to_bytes(4, "little")

    def lane_offset(self, lane: int) -> int:
        """Return a lane's byte offset in the file; `num_lanes` gives the end of the last lane."""
        return len(self.header(bytes(16))) + lane * self.lane_bytes

    def checksum_offset(self, lane: int) -> int:
        """Return the byte offset of a lane's checksum; `num_lanes` gives the end of the file."""
        return self.lane_offset(self.num_lanes) + 4 * lane

    @property
    def file_bytes(self) -> int:
        """Bytes of a file."""
        return self.checksum_offset(self.num_lanes)


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
            num_heads = layout.width // (config.qk_head_dim + config.v_head_dim)
            self._heads = range(rank * num_heads, (rank + 1) * num_heads)
        # A replicated cache is written by the first rank alone.
        self.writes = layout.form == "heads" or layout.shards > 1 or rank == 0
        self.is_first = rank == 0

    def lanes(self, index: int) -> range:
        """Return this rank's lanes of a page's unit `index`."""
        if self._heads is not None:
            return self._heads
        shard, shards = self._layout.shard, self._layout.shards
        return range((shard - index * UNIT) % shards, UNIT, shards)

    def view(self, page: Bytes, index: int) -> Bytes:
        """Return a view of this rank's lanes of a page's unit `index`.

        Args:
            page: [layers, slots, entry bytes].
            index: of the unit in its page.

        Returns:
            [lanes, ...], strided; read in order, its values are the lanes' bytes.
        """
        if self._heads is not None:
            rows = page[:, index * UNIT : (index + 1) * UNIT]
            return rows.reshape(*rows.shape[:2], len(self._heads), -1).transpose(2, 0, 1, 3)
        lanes = self.lanes(index)
        first = (index * UNIT + lanes.start) // self._layout.shards
        return page[:, first : first + len(lanes)].transpose(1, 0, 2)


class DiskFiles:
    """Writes and reads this rank's lanes on background threads.

    Args:
        folder: of the model and format; must exist.
        session: part of the names of this run's unfinished files; the same on all ranks, unique
            to this run.
        fmt: the format.
        shard: this rank's part of it.
        pages: [host slots, layers, slots of a page, entry bytes], the memory of the host tier.

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

    def store(self, slot: int, units: tuple[bytes, ...]) -> None:
        """Write the page in a host slot in the background; its data is copied first."""
        if not self._shard.writes:
            return
        for index, unit in enumerate(units):
            lanes = self._shard.lanes(index)
            rows = self._shard.view(self._pages[slot], index).copy()
            rows = rows.reshape(len(lanes), self._fmt.lane_bytes)
            done = self._writer.submit(self._write, unit, lanes, rows)
            if self._shard.is_first:
                self.writes.append((unit, done))

    def remove(self, path: Path) -> None:
        """Delete a file in the background, after all writes that are queued."""
        self._writer.submit(remove_own, path)

    def fetch(self, slot: int, units: tuple[bytes, ...]) -> None:
        """Read a page into a host slot in the background."""
        self._reads[slot] = self._reader.submit(self._read, slot, units)

    def is_read(self, slot: int) -> bool:
        """Return True if this rank has finished reading into a slot."""
        return slot in self._reads and self._reads[slot].done()

    def outcomes(self, slots: list[int], seconds: float) -> list[int]:
        """Return PENDING, GOOD or BAD for each slot's read, after waiting at most `seconds`."""
        reads = [self._reads[slot] for slot in slots]
        wait(reads, seconds)
        return [_outcome(read) for read in reads]

    def forget(self, slot: int) -> None:
        """Drop a read that all ranks have finished."""
        del self._reads[slot]

    def _write(self, unit: bytes, lanes: range, rows: Bytes) -> bool:
        if not self.is_writable:
            return False
        path = self._folder / f"{unit.hex()}.{self._session}.tmp"
        try:
            file = os.open(path, _FLAGS | os.O_CREAT, 0o644)
            try:
                for lane, row in zip(lanes, rows, strict=True):
                    _write_at(file, row.data, self._fmt.lane_offset(lane))
                for lane, row in zip(lanes, rows, strict=True):
                    checksum = self._fmt.checksum(unit, lane, row.data)
                    _write_at(file, checksum, self._fmt.checksum_offset(lane))
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
        """Rename a file once all ranks have written their lanes; return False if the name is taken.

        Raises:
            OSError: another rank has not written its lanes in time.
        """
        fmt = self._fmt
        deadline = time.monotonic() + _CHECKSUM_SECONDS
        while True:
            # Opened again each time, so that a network file system shows the other ranks' writes.
            with os.fdopen(os.open(path, _FLAGS), "r+b", buffering=0) as file:
                checksums = os.pread(file.fileno(), 4 * fmt.num_lanes, fmt.checksum_offset(0))
                written = np.frombuffer(checksums[: len(checksums) // 4 * 4], np.uint32)
                if len(written) == fmt.num_lanes and written.all():
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

    def _read(self, slot: int, units: tuple[bytes, ...]) -> bool:
        return all(self._read_unit(slot, index, unit) for index, unit in enumerate(units))

    def _read_unit(self, slot: int, index: int, unit: bytes) -> bool:
        fmt = self._fmt
        lanes = self._shard.lanes(index)
        rows = np.empty((len(lanes), fmt.lane_bytes), np.uint8)
        try:
            with self.path(unit).open("rb", buffering=0) as file:
                number = file.fileno()
                header = fmt.header(unit)
                if os.fstat(number).st_size != fmt.file_bytes or file.read(len(header)) != header:
                    return False
                for lane, row in zip(lanes, rows, strict=True):
                    num_read = os.preadv(number, [row.data], fmt.lane_offset(lane))
                    checksum = os.pread(number, 4, fmt.checksum_offset(lane))
                    if num_read != len(row) or checksum != fmt.checksum(unit, lane, row.data):
                        return False
                if self._shard.is_first:
                    with contextlib.suppress(PermissionError):  # another user's file
                        os.utime(number)
        except OSError:
            return False
        view = self._shard.view(self._pages[slot], index)
        view[...] = rows.reshape(view.shape)
        return True


def _outcome(read: Future[bool]) -> int:
    if not read.done():
        return PENDING
    return GOOD if read.result() else BAD


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    if os.pwrite(file, data, offset) != len(data):
        raise OSError("the disk is full")
