"""Paths on the command line that are not files: standard input and output, pipes, descriptors.

`-` is standard input or output. A shell passes the pipe of a process substitution as a descriptor
(`/dev/fd/63`), which torchrun keeps open but does not pass on to the ranks.
"""

import errno
import os
import re
import stat
import sys
from pathlib import Path

STANDARD = Path("-")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)|/dev/std(in|out|err)")
_STANDARD = {"in": 0, "out": 1, "err": 2}


def is_stream(path: Path) -> bool:
    """Return True for `-`, a pipe, a terminal or a device: neither a file nor a directory."""
    if path == STANDARD:
        return True
    try:
        mode = _openable(path).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def open_stream(path: Path, flags: int, standard: int) -> int:
    """Open a stream; return a new descriptor.

    Args:
        path: a path for which `is_stream` is true.
        flags: flags of `os.open`.
        standard: descriptor of `-`, 0 or 1.

    Raises:
        OSError: the stream cannot be opened, or standard input or output is closed.
    """
    if path == STANDARD:
        # If it was closed, another file may have its descriptor since.
        if (sys.__stdin__, sys.__stdout__)[standard] is None:
            raise OSError(errno.EBADF, "it is closed")
        return os.dup(standard)
    number = _number(path)
    if number is not None and _openable(path) == path:
        return os.dup(number)  # a socket, for example, cannot be opened by its name
    # A pipe without a reader is an error instead of a wait.
    flags |= os.O_NONBLOCK if flags & os.O_WRONLY else 0
    descriptor = os.open(_openable(path), flags | os.O_CLOEXEC | os.O_NOCTTY)
    os.set_blocking(descriptor, True)
    return descriptor


def is_named_pipe(path: Path) -> bool:
    """Return True for a named pipe (FIFO), whose opening may wait."""
    return _number(path) is None and path != STANDARD and path.is_fifo()


def is_endless(descriptor: int) -> bool:
    """Return True for a device other than a terminal and /dev/null, which may have no end."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return True
    is_null = status.st_rdev == os.stat(os.devnull).st_rdev
    return stat.S_ISCHR(status.st_mode) and not os.isatty(descriptor) and not is_null


def _number(path: Path) -> int | None:
    """Return the descriptor that a path names; None for other paths."""
    match = _DESCRIPTOR.fullmatch(str(path))
    if match is None:
        return None
    return _STANDARD[match[2]] if match[2] else int(match[1])


def _openable(path: Path) -> Path:
    """Return the path to open; under torchrun, a descriptor is one of the parent process."""
    number = _number(path)
    parent_path = Path(f"/proc/{os.getppid()}/fd/{number}")
    is_of_parent = number is not None and number > 2 and "TORCHELASTIC_RUN_ID" in os.environ
    return parent_path if is_of_parent and parent_path.exists() else path
