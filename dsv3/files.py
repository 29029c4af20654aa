"""Output files: recognized before they are replaced, and replaced atomically.

A program only replaces files in a format that it writes itself. An output that is the same file as
an input, under any name, is refused before any file is opened.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dsv3.errors import ConfigError, OutputError, os_errors_as

_BEGIN_BYTES = 4096  # of a file, enough to recognize its format
# Errors for a file that cannot be replaced by another: a mount, or a directory without permission.
_NOT_REPLACEABLE = {errno.EACCES, errno.EPERM, errno.EBUSY, errno.EROFS, errno.EXDEV}


@dataclass(frozen=True, slots=True)
class Format:
    """A format that a program writes: its name in messages, and a pattern of its first bytes."""

    name: str
    begins: re.Pattern[bytes]


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A path, and the flag that names it; empty if there is none."""

    flag: str
    path: Path

    def __str__(self) -> str:
        return f"{self.flag}={self.path}" if self.flag else str(self.path)


@dataclass(frozen=True, slots=True)
class FileId:
    """The identity of a file, equal for all its names; for a missing file, its path."""

    device: int = 0
    inode: int = 0
    path: str = ""

    @classmethod
    def of(cls, status: os.stat_result) -> "FileId":
        """Return the identity of the file with a status."""
        return cls(status.st_dev, status.st_ino)

    @classmethod
    def at(cls, path: Path) -> "FileId":
        """Return the identity of the file at a path; links are followed."""
        try:
            return cls.of(path.stat())
        except OSError:
            return cls(path=os.path.realpath(path))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Create and yield a file; sync it to disk at the end of the block.

    Raises:
        OSError: the file exists, or cannot be written; then it is removed again.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "r+b")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` at the end of the block, if there was no error.

    Until then the file has a random name in the same directory. It gets the permissions of the
    replaced file.

    Args:
        path: the file; a link is replaced, not followed.

    Raises:
        OSError: the file cannot be written; then `path` is not changed.
    """
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    with new_file(partial) as file:
        _keep_permissions(path, file.fileno())
        yield file
    try:
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a directory to disk, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keep_permissions(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        old = path.lstat()
        new = os.fstat(descriptor)
        if not stat.S_ISREG(old.st_mode):
            return
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def lock(descriptor: int) -> bool:
    """Lock an open file; return False if another process has locked it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return True if an open file still has this path."""
    try:
        return FileId.of(os.fstat(descriptor)) == FileId.of(path.lstat())
    except OSError:
        return False


def is_special(path: Path) -> bool:
    """Return True for a device, a pipe or a directory; links are followed."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def check_output(output: NamedFile, kind: Format) -> None:
    """Check that an output can be written; change nothing.

    Devices and pipes are accepted. Existing files must be empty or of the same format.

    Raises:
        ConfigError: the output cannot be written, or a file of another format would be lost.
    """
    if reason := _refusal(output.path, kind):
        raise ConfigError(f"{output}: {reason}")


def _refusal(path: Path, kind: Format) -> str:
    """Return why an output cannot be written; empty if it can."""
    try:
        begin = _begin_of(path)
    except OSError as error:
        return error.strerror or str(error)
    if begin.strip() and not kind.begins.match(begin):
        return f"another file is there, not {kind.name}; choose another name, or remove it"
    return ""


def _begin_of(path: Path) -> bytes:
    """Return the first bytes of a file to replace; none if it does not exist."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such directory") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        return b""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        return b""
    with open(os.open(path, os.O_RDWR | os.O_CLOEXEC), "rb") as file:
        return file.read(_BEGIN_BYTES)


def write_output(output: NamedFile, kind: Format, content: str | bytes) -> None:
    """Write an output that `check_output` accepts, atomically if the system supports it.

    Raises:
        OutputError: the output cannot be written, or another file was created meanwhile.
    """
    if reason := _refusal(output.path, kind):
        raise OutputError(f"{output}: cannot be written: {reason}")
    data = content.encode() if isinstance(content, str) else content
    with os_errors_as(OutputError, f"{output}: cannot be written"):
        if is_special(output.path):
            # A pipe without a reader is an error instead of a wait.
            descriptor = os.open(output.path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            with open(descriptor, "wb") as file:
                file.write(data)
            return
        target = Path(os.path.realpath(output.path))  # a link stays a link
        try:
            with replacing(target) as file:
                file.write(data)
        except OSError as error:
            if error.errno not in _NOT_REPLACEABLE or not target.exists():
                raise
            target.write_bytes(data)


def refuse_same_files(outputs: Iterable[NamedFile], inputs: Iterable[NamedFile]) -> None:
    """Check that no output is an input or another output, by path or by link.

    Devices and pipes may be given more than once.

    Raises:
        ConfigError: names both files.
    """
    seen = {FileId.at(file.path): file for file in inputs}
    for output in outputs:
        if is_special(output.path):
            continue
        other = seen.setdefault(FileId.at(output.path), output)
        if other is not output:
            raise ConfigError(f"{output}: the same file as {other}; choose another name")
