"""What a command line names that is no file: standard input and output, pipes, descriptors.

`-` is standard input or output. A shell names the pipe of a process substitution by a descriptor
(`/dev/fd/63`), which torchrun keeps open but does not hand on to the ranks.
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
    """Return True for what is neither a file nor a directory: `-`, a pipe, a terminal, a device."""
    if path == STANDARD:
        return True
    try:
        mode = _where(path).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def open_stream(path: Path, flags: int, standard: int) -> int:
    """Open a stream; return a new descriptor.

    Args:
        path: for which `is_stream` is true.
        flags: of `os.open`.
        standard: the descriptor that `-` stands for, 0 or 1.

    Raises:
        OSError: it cannot be opened, or standard input or output is closed.
    """
    if path == STANDARD:
        # Where it was closed, another file may have its number since.
        if (sys.__stdin__, sys.__stdout__)[standard] is None:
            raise OSError(errno.EBADF, "it is closed")
        return os.dup(standard)
    number = _number(path)
    if number is not None and _where(path) == path:
        return os.dup(number)  # a socket, say, cannot be opened by its name
    # A pipe without a reader is an error then, and not a wait for one.
    flags |= os.O_NONBLOCK if flags & os.O_WRONLY else 0
    descriptor = os.open(_where(path), flags | os.O_CLOEXEC | os.O_NOCTTY)
    os.set_blocking(descriptor, True)
    return descriptor


def is_named_pipe(path: Path) -> bool:
    """Return True for a pipe with a name of its own in a directory: opening it may wait."""
    return _number(path) is None and path != STANDARD and path.is_fifo()


def is_endless(descriptor: int) -> bool:
    """Return True for a device other than a terminal and /dev/null: it need not have an end."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return True
    is_null = status.st_rdev == os.stat(os.devnull).st_rdev
    return stat.S_ISCHR(status.st_mode) and not os.isatty(descriptor) and not is_null


def _number(path: Path) -> int | None:
    """Return the descriptor of this process that a path names."""
    match = _DESCRIPTOR.fullmatch(str(path))
    if match is None:
        return None
    return _STANDARD[match[2]] if match[2] else int(match[1])


def _where(path: Path) -> Path:
    """Return where a stream is to be opened: under torchrun, descriptors are its own."""
    number = _number(path)
    theirs = Path(f"/proc/{os.getppid()}/fd/{number}")
    is_theirs = number is not None and number > 2 and "TORCHELASTIC_RUN_ID" in os.environ
    return theirs if is_theirs and theirs.exists() else path
