"""The journal of a conversion: its progress, the list of its files, and its lock.

The journal is one append-only file in the output directory. The name of a file is written to it
before the file is created, so that after a kill the converter's files can be distinguished from the
user's. The line of a tensor is written only after the tensor's bytes are on disk, so that a
conversion killed at any moment can resume from its journal.
"""

import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.writer import Digests, OutputFiles
from dsv3.errors import CheckpointError, os_errors_as
from dsv3.files import is_at, lock

JOURNAL = ".convert.journal"
COMMIT_BYTES = 256 << 20  # most finished work that a kill can lose
_HEAD = b'{"plan": '


@dataclass
class JournalRecord:
    """The contents of a journal.

    Attributes:
        plan: id of the latest plan.
        names: files that this and earlier conversions may have created, under final or temporary
            names.
        replaces: files of another checkpoint to remove before the new files are renamed.
        finished: tensors on disk, with their digests.
        is_written: all files are complete under temporary names; replaced files are still to be
            removed, and the new ones renamed.
    """

    plan: str = ""
    names: set[str] = field(default_factory=set)
    replaces: list[str] = field(default_factory=list)
    finished: dict[str, Digests] = field(default_factory=dict)
    is_written: bool = False

    def fits(self, plan: Plan) -> bool:
        """Return True if the journal is of this plan and not damaged."""
        return self.plan == plan.id and all(
            name in plan.tensors
            and len(digests) == 1 + len(plan.tensors[name].slices)
            and all(isinstance(digest, str) for digest in digests)
            for name, digests in self.finished.items()
        )

    def apply(self, line: Any) -> None:
        """Update the record with the next parsed line."""
        if isinstance(line, dict):
            if "plan" in line:
                self.plan = line["plan"]
                self.finished = {}
                self.is_written = False
            self.names |= {name for name in line.get("names", ()) if _is_inside(name)}
            self.replaces = [n for n in line.get("replaces", self.replaces) if _is_inside(n)]
            self.is_written = self.is_written or "written" in line
        else:
            name, digests = line
            self.finished[name] = tuple(digests)


def read_record(folder: Path) -> JournalRecord:
    """Return the record in a directory's journal; an empty one if there is no journal.

    Raises:
        CheckpointError: a file of that name is not a journal.
    """
    path = folder / JOURNAL
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return JournalRecord()
    except OSError as error:
        raise _foreign(path, "a link" if path.is_symlink() else error.strerror) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _foreign(path, "not a regular file")
    with open(descriptor, "rb") as file:
        return _parse(file, path)[0]


def _parse(file: BinaryIO, path: Path) -> tuple[JournalRecord, int]:
    """Return the contents of a journal, and the length of its complete lines in bytes."""
    begin = file.read(len(_HEAD))
    if not _HEAD.startswith(begin):
        raise _foreign(path, "another program's file")
    file.seek(0)
    record = JournalRecord()
    length = 0
    for line in file:
        try:
            if not line.endswith(b"\n"):  # incomplete: a kill interrupted the write
                break
            record.apply(json.loads(line))
        except (ValueError, TypeError, RecursionError):  # damaged, as by a power cut
            break
        length += len(line)
    return record, length


def _is_inside(name: str) -> bool:
    """Return True for a path that does not leave its directory."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _foreign(path: Path, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{path}: not the journal of a conversion ({reason}); move it away")


class ConversionJournal(AbstractContextManager["ConversionJournal"]):
    """A journal open for writing; only one process can open it, so it locks the directory.

    Attributes:
        record: its contents.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._pool = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        read_record(folder)  # raises for a file that is not a journal
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os_errors_as(CheckpointError, f"{self._path}: cannot be written"):
            self._file = os.fdopen(os.open(self._path, flags, 0o644), "r+b")
        try:
            with os_errors_as(CheckpointError, f"{self._path}: cannot be locked"):
                # If the file was removed meanwhile, another conversion has just ended.
                descriptor = self._file.fileno()
                is_ours = lock(descriptor) and is_at(descriptor, self._path)
            if not is_ours:
                raise CheckpointError(f"{folder}: another conversion is writing here")
            self.record, length = _parse(self._file, self._path)
            self._file.truncate(length)
        except CheckpointError:
            self._file.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if not self.record.plan:
            self.remove()
        self._file.close()

    def begin(self, plan: str, names: Iterable[str], replaces: Iterable[str]) -> None:
        """Start a plan; only the file names of earlier plans are kept."""
        self._append_line({"plan": plan, "names": sorted(names), "replaces": list(replaces)})

    def resume(self, names: Iterable[str], replaces: Iterable[str]) -> None:
        """Resume the same plan; its side files and replaced files may have changed."""
        if not self.record.names.issuperset(names) or self.record.replaces != list(replaces):
            self._append_line({"names": sorted(names), "replaces": list(replaces)})

    def end_writing(self) -> None:
        """Record that all files are complete and on disk."""
        self._append_line({"written": True})

    def _append_line(self, line: dict[str, Any]) -> None:
        self._append([json.dumps(line)])
        self.record.apply(line)

    def add(self, name: str, digests: Digests, num_bytes: int, files: OutputFiles) -> None:
        """Record a finished tensor; commit in the background after `COMMIT_BYTES` of them."""
        self.record.finished[name] = digests
        self._pending.append(json.dumps([name, digests]))
        self._pending_bytes += num_bytes
        is_idle = self._commit is None or self._commit.done()
        if self._pending_bytes >= COMMIT_BYTES and is_idle:
            self._wait()
            self._commit = self._pool.submit(self._sync_and_append, files, self._pending)
            self._pending = []
            self._pending_bytes = 0

    def flush(self, files: OutputFiles) -> None:
        """Wait until all recorded tensors are on disk."""
        self._wait()
        self._sync_and_append(files, self._pending)
        self._pending = []
        self._pending_bytes = 0

    def remove(self) -> None:
        """Delete the journal of a finished conversion."""
        self._path.unlink()

    def _wait(self) -> None:
        if self._commit is not None:
            self._commit.result()

    def _sync_and_append(self, files: OutputFiles, lines: list[str]) -> None:
        files.sync()
        self._append(lines)

    def _append(self, lines: Iterable[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        descriptor = self._file.fileno()
        with os_errors_as(CheckpointError, f"{self._path}: cannot be written"):
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
