"""The output of a batch job as a journal: every row exactly once, however often it is killed.

Lines are appended whole and handed to the operating system at once, so killing the process
loses none; they are forced to the disk every few seconds, so a power cut loses few. A start
first makes the file good: torn lines go, and so do the errors that were ours (5xx) and those
of rows that were changed since, which are tried again.
"""

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import ConfigError, OutputError, os_errors_as
from dsv3.text.batch_file import Row, RowKey, row_key

LINE_START = b'{"id": "batch_req_'  # of every line of ours, whole or torn
SYNC_SECONDS = 5.0

_WAYS_OUT = "--overwrite starts afresh, another --output-file keeps this one"

Range = tuple[int, int]  # first byte and the one after the last


@dataclass(frozen=True, slots=True)
class _Line:
    """What is remembered of a line that was written earlier."""

    digest: int  # the first 64 bits
    failed_at: Range | None  # where a bad request's line lies, in case it is to be dropped


class Journal(contextlib.AbstractContextManager["Journal"]):
    """An output file being written; use as a context manager.

    Attributes:
        num_done: rows that an earlier run answered or found to be bad requests.
        num_failed: those of them that are bad requests.
        fingerprint: of the model that answers.
    """

    def __init__(self, path: Path, overwrite: bool = False, fingerprint: str = "") -> None:
        """Open the file (made if it is not there) and read what it holds; `resume` is next.

        With `overwrite`, what it holds does not count and goes. Else, answers of a model with
        another fingerprint are an error.
        """
        self.fingerprint = fingerprint
        self._path = Path(os.path.realpath(path))
        self._done: dict[RowKey, _Line] = {}
        self._dropped: list[Range] = []
        self._synced = time.monotonic()
        self._fd = self._open()
        self._is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)  # not /dev/null
        self._size = os.fstat(self._fd).st_size if self._is_file else 0
        if overwrite:
            self._dropped.append((0, self._size))
        elif self._is_file:
            try:
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
        """Hold the lines already there to the rows of the input, and drop what is to be redone.

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
        self._repair()

    def write(self, line: bytes) -> None:
        """Append one line. If that fails, the lines before it are safe."""
        data = memoryview(line + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            self._size += len(line) + 1
            if self._is_file and time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        except OSError as error:
            self._truncate(self._size)
            raise OutputError(
                f"{self._path}: cannot write ({error.strerror}); the rows written so far are "
                "safe, start again to go on from there"
            ) from None

    def close(self) -> None:
        """Force what was written to the disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._fd)
        os.close(self._fd)

    def _open(self) -> int:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            folder = self._path.parent
            reason = error.strerror if folder.is_dir() else f"there is no directory {folder}"
            raise ConfigError(f"--output-file {self._path}: {reason}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(
                f"--output-file {self._path}: another process is writing it"
            ) from None
        except OSError:
            pass  # a file system without locks
        return fd

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
            begun = raw[: len(LINE_START)].split(b"\0")[0]  # a power cut leaves zeros behind
            if not LINE_START.startswith(begun):
                raise ConfigError(
                    f"--output-file {self._path}, line {number}: not a line of results; "
                    "is this the right file? --overwrite replaces it"
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
            if end < self._size:
                self._truncate(end)
            if self._dropped:
                self._rewrite()
            if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
                self._size += os.write(self._fd, b"\n")  # a line torn off right at its end

    def _rewrite(self) -> None:
        """Put a file without the dropped lines in the place of this one, all at once."""
        part = self._path.with_name(self._path.name + ".part")
        try:
            with part.open("wb") as target, self._path.open("rb") as source:
                os.fchmod(target.fileno(), stat.S_IMODE(os.fstat(self._fd).st_mode))
                dropped, begin = {first for first, _ in self._dropped}, 0
                for line in source:
                    target.write(b"" if begin in dropped else line)
                    begin += len(line)
                target.flush()
                os.fsync(target.fileno())
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size
        self._dropped = []

    def _truncate(self, size: int) -> None:
        if self._is_file:
            os.ftruncate(self._fd, size)
            self._size = size


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
