"""The output file of a batch job as a journal: each row exactly once, however often it is killed.

Complete lines are appended and passed to the operating system at once, so a kill loses none; they
are synced to disk every few seconds, so a power cut loses few. Opening the file reads the lines of
an earlier run and changes nothing: the file is repaired before the first new line, or at the end.
The repair removes incomplete lines, and errors of rows that are run again: server errors (5xx), and
errors of rows that have changed since.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3.errors import ConfigError, OutputError, os_errors_as
from dsv3.files import is_at, lock, replacing
from dsv3.serve.batch_file import Row, RowKey, row_key
from dsv3.streams import STANDARD, is_named_pipe, is_stream, open_stream

LINE_START = b'{"id": "batch_req_'  # first bytes of every line
SYNC_SECONDS = 5.0
CHECK_SECONDS = 1.0  # between checks that the file still exists
_OPEN_TRIES = 10
_DELETED = " (deleted)"  # suffix of links in /proc/self/fd

_REMEDY = "--overwrite starts afresh, another --output-file keeps this one"

Range = tuple[int, int]  # start and stop, in bytes


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of an earlier run."""

    digest: int  # the first 64 bits
    failed_at: Range | None  # bytes of the line of a bad request, which may have to be dropped


class BatchJournal(contextlib.AbstractContextManager["BatchJournal"]):
    """An output file being written; use as a context manager.

    Attributes:
        num_done: rows that an earlier run has answered, or refused as bad requests.
        num_failed: the bad requests among them.
        fingerprint: fingerprint of the model.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        fingerprint: str = "",
        when_emptied: Callable[[], None] = lambda: None,
    ) -> None:
        """Open or create the file and read its lines; call `resume` next.

        Args:
            path: the file; devices and pipes are only written to.
            overwrite: ignore the results in the file, and remove them before the first new line.
            fingerprint: answers of a model with another fingerprint are an error.
            when_emptied: called after results were removed because of `overwrite`.

        Raises:
            ConfigError: the file cannot be opened, has other contents, or belongs to another job.
        """
        self.fingerprint = fingerprint
        self._is_file = not is_stream(path)
        self._path = Path(os.path.realpath(path)) if self._is_file else path
        self._name = "standard output" if path == STANDARD else str(self._path)
        self._overwrite = overwrite
        self._when_emptied = when_emptied
        self._done: dict[RowKey, _Line] = {}
        self._dropped: list[Range] = []
        self._has_begun = False
        self._is_new = False
        self._synced = time.monotonic()
        self._checked = self._synced
        self._fd = self._open_file() if self._is_file else self._open_stream()
        self._size = os.fstat(self._fd).st_size if self._is_file else 0
        try:
            if overwrite:
                self._refuse_other_files()
                self._dropped.append((0, self._size))
            elif self._is_file:
                self._scan()
        except ConfigError:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_done(self) -> int:
        """Number of rows that need not be run again."""
        return len(self._done)

    @property
    def num_failed(self) -> int:
        """Number of bad requests among the finished rows."""
        return sum(line.failed_at is not None for line in self._done.values())

    def __contains__(self, row: Row) -> bool:
        return row.key in self._done

    def resume(self, rows: Iterable[Row]) -> None:
        """Compare the existing lines with the rows of the input; the file is not changed.

        Raises:
            ConfigError: an answered row has changed since, or is no longer in the input.
        """
        if self._done:
            unmatched = dict(self._done)
            for row in rows:
                line = unmatched.pop(row.key, None)
                if line is not None and line.digest != _short(row.digest):
                    reason = f"row {row.number} was changed, or a flag that it depends on"
                    self._drop_changed(row.key, line, reason)
            for key, line in unmatched.items():
                self._drop_changed(key, line, "the input has no such row")

    def begin(self) -> None:
        """Remove the lines to redo, or all lines with `overwrite`; `write` calls this first.

        Raises:
            OutputError: the file cannot be written, or another program has changed it.
        """
        if self._has_begun:
            return
        self._check()
        if self._is_file:
            self._repair()
        elif is_named_pipe(self._path):
            # So far this process was also a reader, so that opening did not wait for one. From now
            # on, a pipe without readers is an error instead of an endless wait.
            with os_errors_as(OutputError, f"{self._name}: cannot write"):
                self._replace_descriptor(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC))
        self._has_begun = True
        if self._overwrite:
            self._when_emptied()

    def write(self, line: bytes) -> None:
        """Append a line; if that fails, earlier lines are not affected."""
        self.begin()
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self._check()
        data = memoryview(line + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            self._size += len(line) + 1
            if self._is_file and time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut(self._size)
            advice = "the rows written so far are safe, run it again to resume"
            if not self._is_file:
                advice = "a pipe or a terminal is not resumed, a file is"
            raise OutputError(f"{self._name}: cannot write ({error.strerror}); {advice}") from None

    def finish(self) -> None:
        """Sync all results to disk, and check that the file still has its name.

        Raises:
            OutputError: the results cannot be written, or the file was removed or changed.
        """
        self.begin()
        self._check()
        if self._is_file:
            with os_errors_as(OutputError, f"{self._path}: cannot write"):
                os.fsync(self._fd)

    def close(self) -> None:
        """Sync and close the file; remove a new file without lines."""
        with contextlib.suppress(OSError):
            os.fsync(self._fd)
            if self._is_new and not self._has_begun and is_at(self._fd, self._path):
                self._path.unlink()
        os.close(self._fd)

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._path, flags | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
        except FileExistsError:
            raise
        except OSError as error:
            folder = self._path.parent
            reason = error.strerror if folder.is_dir() else f"there is no directory {folder}"
            raise ConfigError(f"--output-file {self._path}: {reason}") from None

    def _open_stream(self) -> int:
        """Open a pipe, a terminal or a device."""
        flags = os.O_RDWR if is_named_pipe(self._path) else os.O_WRONLY
        with os_errors_as(ConfigError, f"--output-file {self._name}"):
            return open_stream(self._path, flags | os.O_APPEND, 1)

    def _open_file(self) -> int:
        """Open or create a regular file, and lock it."""
        for _ in range(_OPEN_TRIES):
            try:
                fd = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._is_new = True
            except FileExistsError:
                fd = self._open(os.O_RDWR | os.O_CREAT)
                self._is_new = False
            is_ours = True
            with contextlib.suppress(OSError):  # a file system without locks
                is_ours = lock(fd)
            if is_ours and is_at(fd, self._path):  # the file was not replaced meanwhile
                return fd
            os.close(fd)
            if not is_ours:
                raise ConfigError(f"--output-file {self._path}: another process is writing it")
        raise ConfigError(f"--output-file {self._path}: another process replaces it all the time")

    def _replace_descriptor(self, fd: int) -> None:
        os.close(self._fd)
        self._fd = fd

    def _check(self) -> None:
        """Raise OutputError if another program has removed, renamed or changed the file."""
        self._checked = time.monotonic()
        if not self._is_file:
            return
        if not is_at(self._fd, self._path):
            raise OutputError(
                f"{self._path}: was removed or renamed while the job ran; {self._whereabouts()}"
            )
        size = os.fstat(self._fd).st_size
        if size != self._size:
            raise OutputError(
                f"{self._path}: was changed by another program while the job ran (it has {size} "
                f"bytes, not {self._size}); start again to answer the rows that are missing"
            )

    def _whereabouts(self) -> str:
        """Return a message with the current place of a renamed file."""
        num_names = 0
        now = "that file"
        with contextlib.suppress(OSError):  # a system without /proc, or a network file system
            num_names = os.fstat(self._fd).st_nlink
            now = os.readlink(f"/proc/self/fd/{self._fd}")
        if not num_names:
            return "its results are lost, start again to answer all rows"
        if now.endswith(_DELETED):  # /proc shows the path that the file was opened by
            now = "a hard link of that file"
        return f"its results are in {now}; move it back, then run it again to resume"

    def _refuse_other_files(self) -> None:
        """Raise ConfigError if a file to overwrite does not begin with a result."""
        begin = os.pread(self._fd, len(LINE_START), 0) if self._is_file else b""
        if begin.strip() and not _is_begun(begin):
            raise ConfigError(
                f"--output-file {self._path}: not a file of results, which --overwrite does "
                "not replace; choose another name, or remove it first"
            )

    def _scan(self) -> None:
        """Collect the existing lines, and the ranges of lines to drop."""
        with self._path.open("rb") as file:
            start = 0
            for number, raw in enumerate(file, 1):
                stop = start + len(raw)
                self._scan_line(number, raw, (start, stop))
                start = stop

    def _scan_line(self, number: int, raw: bytes, position: Range) -> None:
        result = _read_line(raw)
        if result is None:
            if not _is_begun(raw):
                raise ConfigError(
                    f"--output-file {self._path}, line {number}: not a line of results; "
                    "is this the right file? If not, choose another"
                )
            self._dropped.append(position)  # an incomplete line
            return
        if self.fingerprint and result.fingerprint not in ("", self.fingerprint):
            raise ConfigError(
                f"--output-file {self._path}, line {number}: an answer of another model or dtype "
                f"({result.fingerprint}, this one is {self.fingerprint}); {_REMEDY}"
            )
        if result.status >= 500 or result.key in self._done:
            self._dropped.append(position)
        else:
            failed_at = position if result.status >= 400 else None
            self._done[result.key] = _Line(_short(result.digest), failed_at)

    def _drop_changed(self, key: RowKey, line: _Line, reason: str) -> None:
        if line.failed_at is None:
            name = key if isinstance(key, str) else key[0]
            raise ConfigError(
                f"--output-file {self._path} holds the answer to custom_id={name!r}, but {reason}; "
                f"{_REMEDY}"
            )
        self._dropped.append(line.failed_at)
        del self._done[key]

    def _repair(self) -> None:
        """Remove the dropped lines: at the end by truncation, others by rewriting the file."""
        self._dropped.sort()
        end = self._size
        while self._dropped and self._dropped[-1][1] == end:
            end = self._dropped.pop()[0]
        with os_errors_as(OutputError, f"{self._path}: cannot be repaired"):
            self._cut(end)
            if self._dropped:
                self._rewrite()
            if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
                self._size += os.write(self._fd, b"\n")  # the last line lacks only its end

    def _rewrite(self) -> None:
        """Replace the file atomically by one without the dropped lines."""
        dropped = {start for start, _ in self._dropped}
        position = 0
        with replacing(self._path) as target:
            with self._path.open("rb") as source:
                for line in source:
                    if position not in dropped:
                        target.write(line)
                    position += len(line)
            with contextlib.suppress(OSError):  # a file system without locks
                lock(target.fileno())
            fd = os.dup(target.fileno())
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        self._replace_descriptor(fd)
        self._size = os.fstat(self._fd).st_size
        self._dropped = []

    def _cut(self, size: int) -> None:
        """Truncate the file to `size` bytes, if it is longer."""
        if self._is_file and os.fstat(self._fd).st_size > size:
            os.ftruncate(self._fd, size)
            self._size = size


def _is_begun(line: bytes) -> bool:
    """Return True for a result line or the beginning of one; a power cut can add zeros."""
    return LINE_START.startswith(line[: len(LINE_START)].rstrip(b"\0"))


class _Result(NamedTuple):
    """The fields of a result line that matter to later runs."""

    key: RowKey
    digest: str
    status: int
    fingerprint: str


def _read_line(raw: bytes) -> _Result | None:
    """Return the fields of a result line; None for other or incomplete lines."""
    try:
        line = json.loads(raw)
        custom_id = line["custom_id"]
        response = line["response"]
        digest = response["request_id"]
        status = response["status_code"]
        _short(digest)  # raises for a damaged digest
        code = response["body"]["error"]["code"] if status >= 400 else None
        fingerprint = response["body"].get("system_fingerprint", "")
        return _Result(row_key(custom_id, digest, code), digest, status, fingerprint)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _short(digest: str) -> int:
    return int(digest[:16], 16)
