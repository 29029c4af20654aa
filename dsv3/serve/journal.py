"""The output of a batch job as a journal: every row exactly once, however often it is killed.

Lines are appended whole and handed to the operating system at once, so killing the process
loses none; they are forced to the disk every few seconds, so a power cut loses few. A start
reads the lines of an earlier run and changes nothing: the file is repaired with the first new line,
or at the end. Then torn lines go, and so do errors that are tried again: our own (5xx), and errors
of rows that were changed since.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import ConfigError, OutputError, os_errors_as
from dsv3.files import is_at, lock, replacing
from dsv3.serve.batch_file import Row, RowKey, row_key
from dsv3.streams import STANDARD, is_named_pipe, is_stream, open_stream

LINE_START = b'{"id": "batch_req_'  # of every line of ours, whole or torn
SYNC_SECONDS = 5.0
CHECK_SECONDS = 1.0  # between looks whether the file is still there
_OPEN_TRIES = 10
_DELETED = " (deleted)"  # at the end of a link in /proc/self/fd

_WAYS_OUT = "--overwrite starts afresh, another --output-file keeps this one"

Range = tuple[int, int]  # first byte and the one after the last


@dataclass(frozen=True, slots=True)
class _Line:
    """What is remembered of a line that was written earlier."""

    digest: int  # the first 64 bits
    failed_at: Range | None  # where a bad request's line lies, in case it is to be dropped


class BatchJournal(contextlib.AbstractContextManager["BatchJournal"]):
    """An output file being written; use as a context manager.

    Attributes:
        num_done: rows that an earlier run answered or found to be bad requests.
        num_failed: those of them that are bad requests.
        fingerprint: of the model that answers.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        fingerprint: str = "",
        when_emptied: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the file (made if it is not there) and read what it holds; `resume` is next.

        Args:
            path: the file; devices and pipes are written without a look back.
            overwrite: the results in the file do not count, and go with the first new line.
            fingerprint: answers of a model with another one are an error.
            when_emptied: called when results have gone because of `overwrite`.

        Raises:
            ConfigError: the file cannot be opened, is none of results, or belongs to another job.
        """
        self.fingerprint = fingerprint
        self._is_file = not is_stream(path)
        self._path = Path(os.path.realpath(path)) if self._is_file else path
        self._name = "standard output" if path == STANDARD else str(self._path)
        self._overwrite, self._when_emptied = overwrite, when_emptied
        self._done: dict[RowKey, _Line] = {}
        self._dropped: list[Range] = []
        self._has_begun = self._is_new = False
        self._synced = self._checked = time.monotonic()
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
        """Rows that need not be run again."""
        return len(self._done)

    @property
    def num_failed(self) -> int:
        """Rows among them that are bad requests."""
        return sum(line.failed_at is not None for line in self._done.values())

    def __contains__(self, row: Row) -> bool:
        return row.key in self._done

    def resume(self, rows: Iterable[Row]) -> None:
        """Compare the lines already there with the rows of the input; the file stays as it is.

        Raises:
            ConfigError: a row was answered that is not the same, or not there, any more.
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
        """Drop the lines that are to be redone, or all with `overwrite`; `write` does it first.

        Raises:
            OutputError: the file cannot be written, or another program has changed it.
        """
        if self._has_begun:
            return
        self._check()
        if self._is_file:
            self._repair()
        elif is_named_pipe(self._path):
            # Until now this process was a reader, too, so that opening did not have to wait for
            # one. From now on a pipe without readers is an error, and not a wait without an end.
            with os_errors_as(OutputError, f"{self._name}: cannot write"):
                self._take(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC))
        self._has_begun = True
        if self._overwrite:
            self._when_emptied()

    def write(self, line: bytes) -> None:
        """Append one line. If that fails, the lines before it are safe."""
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
            rest = "the rows written so far are safe, start again to go on from there"
            if not self._is_file:
                rest = "a pipe or a terminal is not resumed, a file is"
            raise OutputError(f"{self._name}: cannot write ({error.strerror}); {rest}") from None

    def finish(self) -> None:
        """Make sure that all results are on disk, under their name.

        Raises:
            OutputError: they are not.
        """
        self.begin()
        self._check()
        if self._is_file:
            with os_errors_as(OutputError, f"{self._path}: cannot write"):
                os.fsync(self._fd)

    def close(self) -> None:
        """Force what was written to the disk; a new file without a line goes."""
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
        """Open or make a regular file, and take its lock."""
        for _ in range(_OPEN_TRIES):
            try:
                fd, self._is_new = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL), True
            except FileExistsError:
                fd, self._is_new = self._open(os.O_RDWR | os.O_CREAT), False
            is_ours = True
            with contextlib.suppress(OSError):  # a file system without locks
                is_ours = lock(fd)
            if is_ours and is_at(fd, self._path):  # no other file was put in its place meanwhile
                return fd
            os.close(fd)
            if not is_ours:
                raise ConfigError(f"--output-file {self._path}: another process is writing it")
        raise ConfigError(f"--output-file {self._path}: another process replaces it all the time")

    def _take(self, fd: int) -> None:
        """Go on with another descriptor."""
        os.close(self._fd)
        self._fd = fd

    def _check(self) -> None:
        """Raise OutputError if another program has taken the file away, or changed it."""
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
        """Say where the results are after the file has lost its name."""
        num_names, now = 0, "that file"
        with contextlib.suppress(OSError):  # a system without /proc, or a server that has forgotten
            num_names = os.fstat(self._fd).st_nlink
            now = os.readlink(f"/proc/self/fd/{self._fd}")
        if not num_names:
            return "its results are lost, start again to answer all rows"
        if now.endswith(_DELETED):  # /proc names the path that it was opened by
            now = "a hard link of that file"
        return f"its results are in {now}; move it back and start again to go on from there"

    def _refuse_other_files(self) -> None:
        """Raise ConfigError if a file that is to be emptied does not begin with a result."""
        begin = os.pread(self._fd, len(LINE_START), 0) if self._is_file else b""
        if begin.strip() and not _is_begun(begin):
            raise ConfigError(
                f"--output-file {self._path}: not a file of results, --overwrite empties no "
                "other; choose another name, or remove it first"
            )

    def _scan(self) -> None:
        """Remember the lines already there, and which of them are to be dropped."""
        with self._path.open("rb") as file:
            end = 0
            for number, raw in enumerate(file, 1):
                begin, end = end, end + len(raw)
                self._remember(number, raw, (begin, end))

    def _remember(self, number: int, raw: bytes, where: Range) -> None:
        known = _read_line(raw)
        if known is None:
            if not _is_begun(raw):
                raise ConfigError(
                    f"--output-file {self._path}, line {number}: not a line of results; "
                    "is this the right file? If not, choose another"
                )
            self._dropped.append(where)  # torn
            return
        key, digest, status, model = known
        if self.fingerprint and model not in ("", self.fingerprint):
            raise ConfigError(
                f"--output-file {self._path}, line {number}: an answer of another model or dtype "
                f"({model}, this one is {self.fingerprint}); {_WAYS_OUT}"
            )
        if status >= 500 or key in self._done:
            self._dropped.append(where)
        else:
            self._done[key] = _Line(_short(digest), where if status >= 400 else None)

    def _drop_changed(self, key: RowKey, line: _Line, reason: str) -> None:
        if line.failed_at is None:
            name = key if isinstance(key, str) else key[0]
            raise ConfigError(
                f"--output-file {self._path} holds the answer to custom_id={name!r}, but {reason}; "
                f"{_WAYS_OUT}"
            )
        self._dropped.append(line.failed_at)
        del self._done[key]

    def _repair(self) -> None:
        """Take the dropped lines out: those at the end by cutting, others by rewriting."""
        self._dropped.sort()
        end = self._size
        while self._dropped and self._dropped[-1][1] == end:
            end = self._dropped.pop()[0]
        with os_errors_as(OutputError, f"{self._path}: cannot be repaired"):
            self._cut(end)
            if self._dropped:
                self._rewrite()
            if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
                self._size += os.write(self._fd, b"\n")  # a line torn off right at its end

    def _rewrite(self) -> None:
        """Put a file without the dropped lines in the place of this one, all at once."""
        dropped, begin = {first for first, _ in self._dropped}, 0
        with replacing(self._path) as target:
            with self._path.open("rb") as source:
                for line in source:
                    target.write(b"" if begin in dropped else line)
                    begin += len(line)
            with contextlib.suppress(OSError):  # a file system without locks
                lock(target.fileno())
            fd = os.dup(target.fileno())
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        self._take(fd)
        self._size = os.fstat(self._fd).st_size
        self._dropped = []

    def _cut(self, size: int) -> None:
        """Make the file so short, if it is longer."""
        if self._is_file and os.fstat(self._fd).st_size > size:
            os.ftruncate(self._fd, size)
            self._size = size


def _is_begun(line: bytes) -> bool:
    """Return True for a line of ours or the beginning of one; a power cut leaves zeros behind."""
    return LINE_START.startswith(line[: len(LINE_START)].rstrip(b"\0"))


def _read_line(raw: bytes) -> tuple[RowKey, str, int, str] | None:
    """Return key, digest, status and model of a line of ours, None if it is none or is torn."""
    try:
        line = json.loads(raw)
        custom_id, response = line["custom_id"], line["response"]
        digest, status = response["request_id"], response["status_code"]
        _short(digest)
        code = response["body"]["error"]["code"] if status >= 400 else None
        model = response["body"].get("system_fingerprint", "")
        return row_key(custom_id, digest, code), digest, status, model
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _short(digest: str) -> int:
    return int(digest[:16], 16)
