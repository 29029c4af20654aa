"""The console of a chat, and the one that reads plain lines: a file, a pipe, a simple terminal."""

import contextlib
import os
import sys
from collections.abc import Iterator
from itertools import takewhile
from typing import Protocol
from unicodedata import category

from dsv3.errors import OutputError, os_errors_as, printable

PROMPT = ">>> "
_QUOTES = '"""'
BLOCK_HELP = f"A line of {_QUOTES} begins a message of several lines, another one ends it."


class Console(Protocol):
    """The user's side of a chat.

    Attributes:
        help: how to write messages here, for /help.
    """

    help: str

    def read(self) -> str | None:
        """Return the next message as it was typed, without line end; None at the end of input."""

    def show(self, text: str) -> None:
        """Write lines that are no part of an answer."""

    def note(self, text: str) -> None:
        """Write a remark on a line of its own."""

    def answer(self, text: str) -> None:
        """Write more of an answer; it cannot command a terminal."""

    def thought(self, text: str) -> None:
        """Write more of the thought before an answer."""

    def end_answer(self, remark: str) -> None:
        """End the line of an answer, with a remark if there is one."""

    def interrupted(self) -> bool:
        """Return True if the user has asked to stop the answer."""


class Lines(contextlib.AbstractContextManager["Lines"]):
    """Standard input line by line; answers go to standard output, all else to standard error."""

    help = f"{BLOCK_HELP} Ctrl-C ends the program."

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> str | None:
        """Read a line, or the lines of a block."""
        line = self._line()
        if line is None or not is_mark(line):
            return line
        lines: Iterator[str] = iter(self._line, None)
        return "\n".join(takewhile(lambda line: not is_mark(line), lines))

    def _line(self) -> str | None:
        if sys.__stdin__ is None:  # closed
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
        """Write more of an answer, as it is unless that may command a terminal."""
        is_terminal = sys.stdout.isatty()
        write(sys.stdout.fileno(), harmless(text) if is_terminal else text)

    thought = answer  # what the model thinks before it answers

    def end_answer(self, remark: str) -> None:
        """End the line, with a remark if there is something to say of the answer."""
        write(sys.stdout.fileno(), "\n")
        if remark:
            self.note(remark)

    def interrupted(self) -> bool:
        """Return False: Ctrl-C ends the program."""
        return False


def write(fd: int, text: str) -> None:
    """Write all of a text."""
    data = memoryview(text.encode(errors="replace"))
    with os_errors_as(OutputError, "standard output: cannot write"):
        while data:
            data = data[os.write(fd, data) :]


def harmless(text: str) -> str:
    """Return `text` without characters that a terminal obeys, apart from newlines and tabs."""
    return "".join(char for char in text if char in "\n\t" or category(char) != "Cc")


def is_mark(line: str) -> bool:
    """Return True if a line begins or ends a message of several lines."""
    return line.rstrip() == _QUOTES
