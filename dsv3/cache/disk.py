"""Cached pages as files, one for every 64 positions, written and read by all ranks together.

A file lies in a folder named after model and format, under the hash of all tokens up to its last:
nothing says how many ranks wrote it. It holds

    header   magic, the folder's key, the unit's hash, CRC-32 of these
    lanes    what one rank alone may own: a position of a latent cache, [layers, entry], or a head
             of an expanded one, [layers, 64 positions, entry]
    seals    CRC-32 of each lane, begun with the unit's hash and the lane's number

A rank writes its lanes, then their seals, into a temporary file. The first rank waits until it
finds all seals, writes the header and gives the file its name. So nobody has to ask the others
how far they are, an unfinished file is never found, and damage is always in something that a CRC
covers. The hash stands for the token ids, which are not written: a cache is no copy of the chats.
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
PENDING, GOOD, BAD = range(3)  # what became of a read
_MAGIC = b"dsv3kv1\n"
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
# The ranks write the same files in the same order, so they are never far apart.
_SEAL_SECONDS = 20.0
Bytes = NDArray[np.uint8]
# A directory of a format, and in it: units, unfinished ones, and what `lower_tiers` probes with.
_FOLDER = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}(\.kv|\.\w+\.tmp)|[0-9a-f]{16}\.tmp")


def is_own(path: Path) -> bool:
    """Return True for a file of a disk cache, by its names and how it begins.

    Its header is written last, so an unfinished or torn one begins with zeros, or is short.
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
    """Delete a file of a disk cache, and no other."""
    if is_own(path):
        path.unlink(missing_ok=True)
    elif os.path.lexists(path):
        log.warning("%s: not a file of a disk cache; it is left there", path)


@dataclass(frozen=True, slots=True)
class UnitFormat:
    """What a file holds; the same at every world size.

    Attributes:
        key: names model and format.
        num_lanes: lanes of a file.
        lane_bytes: bytes of each.
    """

    key: bytes
    num_lanes: int
    lane_bytes: int

    @classmethod
    def make(cls, model: bytes, config: ModelConfig, layout: CacheLayout) -> "UnitFormat":
        """Return the format for a cache of the model that the digest `model` names."""
        lanes, lane_bytes = UNIT, config.num_hidden_layers * layout.entry_bytes
        if layout.form == "heads":
            lanes = config.num_attention_heads
            head_values = config.qk_head_dim + config.v_head_dim
            lane_bytes = lane_bytes * UNIT * head_values // layout.width
        about = f"{layout.form} {layout.dtype} {lanes} {lane_bytes}"
        return cls(blake2b(model + about.encode(), digest_size=16).digest(), lanes, lane_bytes)

    def header(self, unit: bytes) -> bytes:
        """Return the header of a unit's file."""
        head = _MAGIC + self.key + unit
        return head + zlib.crc32(head).to_bytes(4, "little")

    def seal(self, unit: bytes, lane: int, data: memoryview) -> bytes:
        """Return a lane's checksum, never zero: that is what an unwritten one reads as."""
        start = zlib.crc32(unit + lane.to_bytes(4, "little"))
        return (zlib.crc32(data, start) or 1).to_bytes(4, "little")

    def lane_at(self, lane: int) -> int:
        """Return where a lane begins; after the last one, the seals do."""
        return len(self.header(bytes(16))) + lane * self.lane_bytes

    def seal_at(self, lane: int) -> int:
        """Return where a seal begins; after the last one, the file ends."""
        return self.lane_at(self.num_lanes) + 4 * lane

    @property
    def file_bytes(self) -> int:
        """Bytes of a file."""
        return self.seal_at(self.num_lanes)


class UnitShard:
    """A rank's part of every unit.

    Args:
        config: the model.
        layout: the rank's cache.
        rank: the rank in its tp group.
    """

    def __init__(self, config: ModelConfig, layout: CacheLayout, rank: int) -> None:
        self._layout = layout
        heads = layout.width // (config.qk_head_dim + config.v_head_dim)
        self._heads = range(rank * heads, rank * heads + heads) if layout.form == "heads" else None
        # Of what all ranks have, the first one writes everything.
        self.writes = layout.form == "heads" or layout.shards > 1 or rank == 0
        self.is_first = rank == 0

    def lanes(self, index: int) -> range:
        """Return the lanes this rank has of a page's unit `index`."""
        if self._heads is not None:
            return self._heads
        shard, shards = self._layout.shard, self._layout.shards
        return range((shard - index * UNIT) % shards, UNIT, shards)

    def view(self, page: Bytes, index: int) -> Bytes:
        """Return the part of a page, [layers, slots, entry bytes], that those lanes are.

        The result is strided, [lanes, ...]; its values in order are the lanes' bytes.
        """
        if self._heads is not None:
            rows = page[:, index * UNIT : (index + 1) * UNIT]
            return rows.reshape(*rows.shape[:2], len(self._heads), -1).transpose(2, 0, 1, 3)
        lanes = self.lanes(index)
        first = (index * UNIT + lanes.start) // self._layout.shards
        return page[:, first : first + len(lanes)].transpose(1, 0, 2)


class DiskFiles:
    """Writes and reads this rank's lanes, on threads of its own.

    Args:
        folder: of the model and format; must exist.
        session: names this run's unfinished files; the same on all ranks, of no other run.
        fmt: the format.
        shard: this rank's part of it.
        pages: [host slots, layers, slots of a page, entry bytes], shared with the host's memory.

    Attributes:
        writes: units being written, in order, and whether all ranks' parts are now in the file.
            Only the first rank is told.
        is_writable: whether all files could be written so far.
    """

    def __init__(
        self, folder: Path, session: str, fmt: UnitFormat, shard: UnitShard, pages: Bytes
    ) -> None:
        self._folder, self._session, self._fmt, self._shard = folder, session, fmt, shard
        self._pages = pages
        self._reads: dict[int, Future[bool]] = {}
        self.writes: deque[tuple[bytes, Future[bool]]] = deque()
        self.is_writable = True
        self._writer = ThreadPoolExecutor(1, "kv-disk-writer")
        self._reader = ThreadPoolExecutor(2, "kv-disk-reader")

    def path(self, unit: bytes) -> Path:
        """Return where a unit's file lies."""
        return self._folder / f"{unit.hex()}.kv"

    def store(self, slot: int, units: tuple[bytes, ...]) -> None:
        """Write a page in the background; its slot may be overwritten at once."""
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
        """Delete a file of the cache, after those that are still to be written."""
        self._writer.submit(remove_own, path)

    def fetch(self, slot: int, units: tuple[bytes, ...]) -> None:
        """Read a page into a slot in the background."""
        self._reads[slot] = self._reader.submit(self._read, slot, units)

    def is_read(self, slot: int) -> bool:
        """Tell whether this rank is done reading."""
        return slot in self._reads and self._reads[slot].done()

    def outcomes(self, slots: list[int], seconds: float) -> list[int]:
        """Return what became of reads, after waiting for at most so long."""
        reads = [self._reads[slot] for slot in slots]
        wait(reads, seconds)
        return [(GOOD if r.result() else BAD) if r.done() else PENDING for r in reads]

    def forget(self, slot: int) -> None:
        """Drop a read that is done with on all ranks."""
        del self._reads[slot]

    def _write(self, unit: bytes, lanes: range, rows: Bytes) -> bool:
        if not self.is_writable:
            return False
        path = self._folder / f"{unit.hex()}.{self._session}.tmp"
        try:
            file = os.open(path, _FLAGS | os.O_CREAT, 0o644)
            try:
                for lane, row in zip(lanes, rows, strict=True):
                    _write_at(file, row.data, self._fmt.lane_at(lane))
                for lane, row in zip(lanes, rows, strict=True):
                    seal = self._fmt.seal(unit, lane, row.data)
                    _write_at(file, seal, self._fmt.seal_at(lane))
            finally:
                os.close(file)
            return not self._shard.is_first or self._publish(path, unit)
        except OSError as error:
            self.is_writable = False
            with contextlib.suppress(OSError):
                remove_own(path)
            log.warning("%s: cannot be written (%s); the disk cache only reads now", path, error)
            return False

    def _publish(self, path: Path, unit: bytes) -> bool:
        """Give a file its name when all ranks have written their part; False if it is taken."""
        deadline, fmt = time.monotonic() + _SEAL_SECONDS, self._fmt
        while True:
            # Opened anew each time: a network file system then asks what others have written.
            with os.fdopen(os.open(path, _FLAGS), "r+b", buffering=0) as file:
                seals = os.pread(file.fileno(), 4 * fmt.num_lanes, fmt.seal_at(0))
                written = np.frombuffer(seals[: len(seals) // 4 * 4], np.uint32)
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
        fmt, lanes = self._fmt, self._shard.lanes(index)
        rows = np.empty((len(lanes), fmt.lane_bytes), np.uint8)
        try:
            with self.path(unit).open("rb", buffering=0) as file:
                number = file.fileno()
                header = fmt.header(unit)
                if os.fstat(number).st_size != fmt.file_bytes or file.read(len(header)) != header:
                    return False
                for lane, row in zip(lanes, rows, strict=True):
                    done = os.preadv(number, [row.data], fmt.lane_at(lane))
                    seal = os.pread(number, 4, fmt.seal_at(lane))
                    if done != len(row) or seal != fmt.seal(unit, lane, row.data):
                        return False
                if self._shard.is_first:
                    with contextlib.suppress(PermissionError):  # another user's file
                        os.utime(number)
        except OSError:
            return False
        view = self._shard.view(self._pages[slot], index)
        view[...] = rows.reshape(view.shape)
        return True


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    if os.pwrite(file, data, offset) != len(data):
        raise OSError("the disk is full")
