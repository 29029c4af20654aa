"""Reports of a rank's failure: in one line, in its log, and to torchrun."""

import faulthandler
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from dsv3.errors import describe_error

_STDERR = 2


def leave_report(line: str, story: str = "") -> None:
    """Write the error file that torchrun reads.

    torchrun's own `record` is not used: it would print stacks.

    Args:
        line: the error.
        story: a longer description; the line again if empty.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": story or line, "timestamp": str(int(time.time()))}
        message = {"message": {"message": line, "extraInfo": extra}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(message))


def reason_of(error: BaseException) -> str:
    """Return the reason of a rank's failure in one line."""
    if is_lost(error):
        return "lost its connection to another rank, which has ended or cannot be reached"
    return describe_error(error)


def is_lost(error: BaseException) -> bool:
    """Return True if an exchange failed because another rank is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/transport" in text or "NCCL" in text)


def report_in_log(line: str, name: str, with_stacks: bool) -> None:
    """Write an error and the stacks of all threads to this rank's log.

    Without a log file, stacks go to standard error, and the line is not repeated there.

    Args:
        line: the error.
        name: of this rank.
        with_stacks: write stacks.
    """
    own_log = _log_file()
    report = f"{line}\n" if own_log != _STDERR else ""
    if with_stacks:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            report += f"stacks of {name}:\n{file.read()}"
    if report:
        os.write(own_log, report.encode())


def _log_file() -> int:
    """Return the descriptor of this rank's own log, or of standard error without one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream:
            return handler.stream.fileno()
    return _STDERR
