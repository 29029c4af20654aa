"""Parsing of incremental text: a parser is a generator that pauses where it needs more text."""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from dsv3.text.stop_strings import overlap

_T = TypeVar("_T")
Steps = Generator[None, None, _T]  # yields while more text is needed, then returns a result


class Scanner:
    """The text that a parser has not consumed.

    Attributes:
        is_closed: no more text will come.
        skipped: the white space before the choice that `next_of` has found.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self.skipped = ""
        self._rest = ""
        self._num_pushed = 0

    def push(self, text: str) -> None:
        """Add text."""
        self._rest += text
        self._num_pushed += len(text)

    @property
    def position(self) -> int:
        """Characters consumed so far."""
        return self._num_pushed - len(self._rest)

    def pass_all(self, emit: Callable[[str], None]) -> None:
        """Pass on all text so far."""
        emit(self._take(len(self._rest)))

    def until(self, marks: Sequence[str], emit: Callable[[str], None]) -> Steps[str | None]:
        """Pass on the text before the first mark; return the mark, or None at the end."""
        while True:
            found = [(self._rest.find(mark), -len(mark), mark) for mark in marks]
            if found := [entry for entry in found if entry[0] >= 0]:
                at, _, mark = min(found)
                emit(self._take(at))
                self._take(len(mark))
                return mark
            num_held = max((overlap(self._rest, mark) for mark in marks), default=0)
            emit(self._take(len(self._rest) - (0 if self.is_closed else num_held)))
            if self.is_closed:
                return None
            yield

    def collect(self, mark: str, limit: int) -> Steps[str | None]:
        """Return the text before a mark; consume nothing if there is none within `limit`."""
        while (at := self._rest.find(mark)) < 0:
            if self.is_closed or len(self._rest) > limit:
                return None
            yield
        text = self._take(at)
        self._take(len(mark))
        return text

    def next_of(self, choices: Sequence[str]) -> Steps[str | None]:
        """Skip white space and return the choice that comes next; otherwise consume nothing."""
        while True:
            text = self._rest.lstrip()
            for choice in choices:
                if text.startswith(choice):
                    self.skipped = self._take(len(self._rest) - len(text))
                    self._take(len(choice))
                    return choice
            if self.is_closed or not any(choice.startswith(text) for choice in choices):
                return None
            yield

    def json_object(self, emit: Callable[[str], None]) -> Steps[bool]:
        """Pass on a JSON object; return True at its end, False if the text ends before."""
        depth = 0
        in_string = is_escaped = False
        while True:
            for i, char in enumerate(self._rest, 1):
                if is_escaped:
                    is_escaped = False
                elif in_string:
                    is_escaped = char == "\\"
                    in_string = char != '"'
                elif char == '"':
                    in_string = True
                else:
                    depth += (char in "{[") - (char in "}]")
                    if depth <= 0 and char in "}]":
                        emit(self._take(i))
                        return True
            emit(self._take(len(self._rest)))
            if self.is_closed:
                return False
            yield

    def _take(self, count: int) -> str:
        text = self._rest[:count]
        self._rest = self._rest[count:]
        return text
