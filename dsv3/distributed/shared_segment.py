"""Memory that the ranks of a group on one host share, and semaphores to wait for each other.

The memory is an anonymous file (memfd). It has no name, so nothing is left behind when ranks are
killed, and no `/dev/shm` is needed, which containers often limit to 64 MiB. The other ranks open it
by the descriptor of the rank that made it, in `/proc`.
"""

import ctypes
import errno
import mmap
import os
from typing import NamedTuple

import torch

# Bytes of a buffer. Larger tensors are exchanged in several rounds.
BUFFER_BYTES = 512 << 10
RECORD_WORDS = 8
_WORD_BYTES = 8
_LINE_BYTES = 64  # of a cache line, and at least of a semaphore: no two share one
# Attempts before a waiting rank sleeps, 0.4 ms: waking up takes long, above all where other
# programs want the core. Not more, because a rank on the same core cannot run before this one
# sleeps: `sched_yield` does not let it, since Linux schedules the ranks' sessions as groups.
_NUM_SPINS = 2000
_FILE_NAME = "dsv3 exchange"  # in /proc/PID/maps


class SegmentHandle(NamedTuple):
    """A segment of another process: its descriptor there, and the identity of the file."""

    pid: int
    descriptor: int
    device: int
    inode: int


class SharedSegment:
    """Two buffers, two records and a row of semaphores for each rank of a group.

    A semaphore for every ordered pair of ranks counts the rounds that the first has published and
    the second has not waited for. Semaphores order memory on every processor, by POSIX: all that a
    rank wrote before `post` is visible to the other after `wait`, and all that it read before is
    read before the other overwrites it. (Flags in plain memory would need fences on ARM or POWER,
    which Python cannot issue.)

    Args:
        descriptor: of the file; it is not needed afterwards.
        rank: of this process in the group.
        size: ranks of the group.

    Attributes:
        buffers: [size, 2, BUFFER_BYTES] uint8.
        records: [size][2] views of `RECORD_WORDS` int64: the call that fills the buffer.

    Raises:
        OSError: the memory cannot be had.
    """

    def __init__(self, descriptor: int, rank: int, size: int) -> None:
        self._area_bytes = _area_bytes(size)
        # Reserved here: memory that turns out to be missing at the first write kills the process.
        # Each rank reserves its own area, so that it is on the rank's own NUMA node.
        os.posix_fallocate(descriptor, rank * self._area_bytes, self._area_bytes)
        memory = mmap.mmap(descriptor, size * self._area_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        areas = torch.frombuffer(memory, dtype=torch.uint8).view(size, self._area_bytes)
        self.buffers = areas[:, -2 * BUFFER_BYTES :].view(size, 2, BUFFER_BYTES)
        words = memoryview(memory).cast("q")
        self.records = [
            [words[start : start + RECORD_WORDS] for start in self._record_starts(other, size)]
            for other in range(size)
        ]
        libc = ctypes.CDLL(None, use_errno=True)
        others = [other for other in range(size) if other != rank]
        for other in others:
            if libc.sem_init(ctypes.c_void_p(self._semaphore(rank, other)), 1, 0):
                raise OSError(ctypes.get_errno(), "sem_init")
        self._posted = [self._semaphore(rank, other) for other in others]
        self._awaited = [self._semaphore(other, rank) for other in range(size)]
        # The functions that cannot block keep the interpreter's lock, which is faster.
        quick = ctypes.PyDLL(None)
        self._sem_post = quick.sem_post
        self._sem_trywait = quick.sem_trywait
        self._sem_wait = libc.sem_wait
        for function in (self._sem_post, self._sem_trywait, self._sem_wait):
            function.argtypes = [ctypes.c_void_p]

    def _record_starts(self, rank: int, size: int) -> list[int]:
        """Return the first words of a rank's records, which follow its semaphores."""
        first = (rank * self._area_bytes + size * _LINE_BYTES) // _WORD_BYTES
        return [first, first + RECORD_WORDS]

    def _semaphore(self, sender: int, receiver: int) -> int:
        return self._address + sender * self._area_bytes + receiver * _LINE_BYTES

    def post(self) -> None:
        """Let all other ranks return from a `wait` for this one."""
        for semaphore in self._posted:
            self._sem_post(semaphore)

    def wait(self, rank: int, is_crowded: bool) -> None:
        """Wait for a `post` of another rank that was not waited for.

        At first without sleeping, because in the midst of a step the other rank is seldom late.
        Without end if it has died: the watchdog ends this process then.

        Args:
            rank: the other rank.
            is_crowded: sleep at once, because another rank needs the core.
        """
        semaphore = self._awaited[rank]
        for _ in range(0 if is_crowded else _NUM_SPINS):
            if not self._sem_trywait(semaphore):
                return
        while self._sem_wait(semaphore):  # interrupted by a signal; Python runs its handler now
            pass


def _area_bytes(size: int) -> int:
    """Return the bytes of one rank's area, whole pages."""
    head = size * _LINE_BYTES + 2 * RECORD_WORDS * _WORD_BYTES
    return -(-head // mmap.PAGESIZE) * mmap.PAGESIZE + 2 * BUFFER_BYTES


def create_file(size: int) -> int:
    """Return the descriptor of a new file for the segment of a group of `size` ranks.

    Raises:
        OSError: the system has no such files, or a limit forbids it.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    descriptor = os.memfd_create(_FILE_NAME)
    try:
        os.ftruncate(descriptor, size * _area_bytes(size))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def handle_of(descriptor: int) -> SegmentHandle:
    """Return the handle by which other processes open a file of this process."""
    status = os.fstat(descriptor)
    return SegmentHandle(os.getpid(), descriptor, status.st_dev, status.st_ino)


def open_file(handle: SegmentHandle) -> int:
    """Return a descriptor of another process's file.

    Raises:
        OSError: it cannot be opened; in another container the process has another id.
    """
    descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    if handle_of(descriptor)[2:] != handle[2:]:
        os.close(descriptor)
        raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
    return descriptor
