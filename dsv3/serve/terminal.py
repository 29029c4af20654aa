"""The console interface of a chat, and the console for files, pipes and simple terminals."""

import contextlib
import os
import sys
from collections.abc import Iterator
from itertools import takewhile
from typing import Protocol, TextIO
from unicodedata import category

from dsv3.errors import OutputError, os_errors_as, printable

PROMPT = ">>> "
_QUOTES = '"""'
BLOCK_HELP = f"A line of {_QUOTES} begins a message of several lines, another one ends it."


class Console(Protocol):
    """The user's side of a chat.

    Attributes:
        help: text for /help about the input of messages.
    """

    help: str

    def read(self) -> str | None:
        """Return the next message without its line end; None at the end of the input."""

    def show(self, text: str) -> None:
        """Write lines that are not part of an answer."""

    def note(self, text: str) -> None:
        """Write a remark on its own line."""

    def answer(self, text: str) -> None:
        """Write more of an answer, without control characters on a terminal."""

    def thought(self, text: str) -> None:
        """Write more of the thought before an answer."""

    def end_answer(self, remark: str) -> None:
        """End an answer; write a remark if it is not empty."""

    def interrupted(self) -> bool:
        """Return True if the user wants to stop the answer."""


class Lines(contextlib.AbstractContextManager["Lines"]):
    """Console for plain lines: answers go to standard output, all else to standard error."""

    help = f"{BLOCK_HELP} Ctrl-C ends the program."

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> str | None:
        """Read a line, or the lines between two marks."""
        line = self._line()
        if line is None or not is_mark(line):
            return line
        lines: Iterator[str] = iter(self._line, None)
        return "\n".join(takewhile(lambda line: not is_mark(line), lines))

    def _line(self) -> str | None:
        if sys.__stdin__ is None:  # standard input is closed
            return None
        if sys.stdin.isatty():
            write(sys.stderr.fileno(), PROMPT)
        line = sys.stdin.buffer.readline()
        return line.decode(errors="replace").rstrip("\r\n") if line else None

    def show(self, text: str) -> None:
        """Write to standard error."""
        write(sys.stderr.fileno(), printable(text) + "\n")

    def note(self, text: str) -> None:
        """Write to standard error."""
        self.show(f"({text})")

    def answer(self, text: str) -> None:
        """Write more of an answer, without control characters on a terminal."""
        is_terminal = sys.stdout.isatty()
        write(sys.stdout.fileno(), harmless(text) if is_terminal else text)

    thought = answer

    def end_answer(self, remark: str) -> None:
        """End the line; write a remark if it is not empty."""
        write(sys.stdout.fileno(), "\n")
        if remark:
            self.note(remark)

    def interrupted(self) -> bool:
        """Return False: Ctrl-C ends the program."""
        return False


def write(fd: int, text: str) -> None:
    """Write a text completely."""
    data = memoryview(text.encode(errors="replace"))
    with os_errors_as(OutputError, "standard output: cannot write"):
        while data:
            data = data[os.write(fd, data) :]


def write_text(stream: TextIO, text: str) -> None:
    """Write a text at once; characters that the stream's encoding lacks are escaped."""
    encoding = stream.encoding or "utf-8"
    with os_errors_as(OutputError, "standard output: cannot write"):
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def harmless(text: str) -> str:
    """Return `text` without control characters, apart from newlines and tabs."""
    return "".join(char for char in text if char in "\n\t" or category(char) != "Cc")


def is_mark(line: str) -> bool:
    """Return True if a line begins or ends a message of several lines."""
    return line.rstrip() == _QUOTES
