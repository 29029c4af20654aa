"""Messages typed in chats, kept in a file between runs."""

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_MAX_FILE = 1 << 20  # bytes; a longer file loses its older half
_MAX_ENTRY = 1 << 14  # bytes of one message; longer messages are not saved
_LOCK_SECONDS = 1.0


def history_path() -> Path | None:
    """Return the file under the user's state directory; None if the user has no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # relative paths are ignored, as the XDG specification requires
        state = os.path.join(os.environ.get("HOME", ""), ".local", "state")
    return Path(state, "dsv3", "chat_history") if os.path.isabs(state) else None


class InputHistory:
    """Messages in a file, one JSON string per line; an unusable file counts as empty.

    Args:
        path: the file; None saves nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def load(self) -> list[str]:
        """Return the messages, oldest first; shorten a file that has become too long."""
        lines: list[bytes] = []
        with contextlib.suppress(OSError), self._open() as file:
            if stat.S_ISREG(os.fstat(file).st_mode):
                lines = _read(file).splitlines(keepends=True)
                if sum(map(len, lines)) > _MAX_FILE:
                    lines = _newest(lines, _MAX_FILE // 2)
                    _rewrite(file, b"".join(lines))
        return [message for line in lines if (message := _message(line))]

    def append(self, message: str) -> None:
        """Add a message to the file."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) <= _MAX_ENTRY:
            with contextlib.suppress(OSError), self._open() as file:
                os.write(file, line)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """Open the file with a lock, since other chats may use it; only this user can read it."""
        if self._path is None:
            raise FileNotFoundError
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self._path, flags, 0o600)
        try:
            _lock(file)
            yield file
        finally:
            os.close(file)


def _lock(file: int) -> None:
    """Lock the file; wait briefly for other chats. Some file systems have no locks."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        except OSError:
            return None
        time.sleep(0.01)


def _read(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _newest(lines: list[bytes], size: int) -> list[bytes]:
    """Return the last lines, at most `size` bytes of them."""
    first = len(lines)
    while first and size >= len(lines[first - 1]):
        first -= 1
        size -= len(lines[first])
    return lines[first:]


def _rewrite(file: int, content: bytes) -> None:
    os.ftruncate(file, 0)
    os.write(file, content)


def _message(line: bytes) -> str:
    """Return the message in a line; an empty string if the line is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        return message if isinstance(message, str) else ""
    return ""
