"""How the failure of a rank is told: in one line, in its log, and to torchrun."""

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from dsv3.errors import describe_error


def leave_report(line: str, story: str = "") -> None:
    """Leave what happened where torchrun looks for it. Its own `record` would print stacks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": story or line, "timestamp": str(int(time.time()))}
        message = {"message": {"message": line, "extraInfo": extra}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(message))


def reason_of(error: BaseException) -> str:
    """Say in one line why a rank fails."""
    if is_lost(error):
        return "lost its connection to another rank, which has ended or cannot be reached"
    return describe_error(error)


def is_lost(error: BaseException) -> bool:
    """Tell whether an exchange failed because another rank is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/transport" in text or "NCCL" in text)


def log_file() -> int:
    """Return the descriptor of this rank's own log, standard error's without one."""
    files = (h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler))
    return next((file.stream.fileno() for file in files if file.stream), 2)
