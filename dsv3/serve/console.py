"""Select the console of a chat."""

import os
import sys
from contextlib import AbstractContextManager

from dsv3.serve.input_history import InputHistory
from dsv3.serve.terminal import Console, Lines

_NO_EDITOR = (
    "plain lines of at most 4,095 bytes, and Ctrl-C ends the program; "
    "pip install prompt_toolkit brings a line editor"
)


def open_console(history: InputHistory) -> AbstractContextManager[Console]:
    """Return a line editor if input and output are a capable terminal; otherwise plain lines."""
    is_capable = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    streams = (sys.stdin, sys.stdout)  # None if they are closed
    if not is_capable or not all(stream and stream.isatty() for stream in streams):
        return Lines()
    try:
        from dsv3.serve.editor import Terminal
    except ImportError:
        lines = Lines()
        lines.note(_NO_EDITOR)
        return lines
    return Terminal(history)
