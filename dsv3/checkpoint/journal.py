"""The journal of a conversion: its progress, the list of its files, and its lock.

It is one file in the output directory, and only ever appended to. A file is named here before it is
made, so that after a kill the converter's files and the user's can be told apart. A line about a
tensor is written only after the tensor's bytes are on disk, so that a conversion killed at any
moment goes on from its journal.
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
COMMIT_BYTES = 256 << 20  # work that a kill may cost
_HEAD = b'{"plan": '


@dataclass
class JournalRecord:
    """The contents of a journal.

    Attributes:
        plan: fingerprint of the plan that was begun last.
        names: files that this and earlier conversions may have made, under their names or
            temporary ones.
        replaces: files of another checkpoint that go before those of this one get their names.
        finished: tensors that are on disk, with their digests.
        is_written: all files are complete, under temporary names. From here on, replaced files are
            removed and the new ones get their names.
    """

    plan: str = ""
    names: set[str] = field(default_factory=set)
    replaces: list[str] = field(default_factory=list)
    finished: dict[str, Digests] = field(default_factory=dict)
    is_written: bool = False

    def fits(self, plan: Plan) -> bool:
        """Return True if all of it can be of this plan; a journal may be damaged."""
        return self.plan == plan.fingerprint and all(
            name in plan.tensors
            and len(digests) == 1 + len(plan.tensors[name].slices)
            and all(isinstance(digest, str) for digest in digests)
            for name, digests in self.finished.items()
        )

    def take(self, line: Any) -> None:
        """Take in the next line."""
        if isinstance(line, dict):
            if "plan" in line:
                self.plan, self.finished, self.is_written = line["plan"], {}, False
            self.names |= {name for name in line.get("names", ()) if _is_inside(name)}
            self.replaces = [n for n in line.get("replaces", self.replaces) if _is_inside(n)]
            self.is_written = self.is_written or "written" in line
        else:
            name, digests = line
            self.finished[name] = tuple(digests)


def read_record(folder: Path) -> JournalRecord:
    """Read the journal in a directory; without one, nothing has begun.

    Raises:
        CheckpointError: a file of that name is no journal.
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
    """Return the contents of a journal, and how many of its bytes are whole lines."""
    begin = file.read(len(_HEAD))
    if not _HEAD.startswith(begin):
        raise _foreign(path, "another program's file")
    file.seek(0)
    record, length = JournalRecord(), 0
    for line in file:
        try:
            if not line.endswith(b"\n"):  # torn while it was written
                break
            record.take(json.loads(line))
        except (ValueError, TypeError, RecursionError):  # as a power cut may leave it
            break
        length += len(line)
    return record, length


def _is_inside(name: str) -> bool:
    """Return True for a path that does not leave its directory."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _foreign(path: Path, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{path}: not the journal of a conversion ({reason}); move it away")


class ConversionJournal(AbstractContextManager["ConversionJournal"]):
    """A journal open for writing. Only one process may have it, which is the directory's lock.

    Attributes:
        record: its contents.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._pool = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        read_record(folder)  # refuses a file that is none
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os_errors_as(CheckpointError, f"{self._path}: cannot be written"):
            self._file = os.fdopen(os.open(self._path, flags, 0o644), "r+b")
        try:
            with os_errors_as(CheckpointError, f"{self._path}: cannot be locked"):
                # One that has just been removed belongs to a conversion that has just ended.
                number = self._file.fileno()
                is_ours = lock(number) and is_at(number, self._path)
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
        """Begin with a plan; of earlier ones, only the names are remembered."""
        self._note({"plan": plan, "names": sorted(names), "replaces": list(replaces)})

    def resume(self, names: Iterable[str], replaces: Iterable[str]) -> None:
        """Go on with the same plan, perhaps with other files around it."""
        if not self.record.names.issuperset(names) or self.record.replaces != list(replaces):
            self._note({"names": sorted(names), "replaces": list(replaces)})

    def end_writing(self) -> None:
        """Note that all files are complete and on disk."""
        self._note({"written": True})

    def _note(self, line: dict[str, Any]) -> None:
        self._append([json.dumps(line)])
        self.record.take(line)

    def add(self, name: str, digests: Digests, num_bytes: int, files: OutputFiles) -> None:
        """Note a finished tensor; commit in the background once enough has come together."""
        self.record.finished[name] = digests
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

    def remove(self) -> None:
        """Delete the journal of a conversion that is done."""
        self._path.unlink()

    def _wait(self) -> None:
        if self._commit is not None:
            self._commit.result()

    def _sync_and_append(self, files: OutputFiles, lines: list[str]) -> None:
        files.sync()
        self._append(lines)

    def _append(self, lines: Iterable[str]) -> None:
        data, descriptor = "".join(f"{line}\n" for line in lines).encode(), self._file.fileno()
        with os_errors_as(CheckpointError, f"{self._path}: cannot be written"):
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
