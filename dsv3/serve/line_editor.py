"""A line being typed: what keys do to it, and how it looks on a screen. Knows no terminal.

A key is the character it makes; keys that make none, and pasted text, are words of `Keys`.
"""

import re
import unicodedata
from collections.abc import Iterator

_PASTE = "paste:"
# The last character of what a key without a character of its own sends, after ESC [ or ESC O.
_CURSOR_KEYS = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_SEQUENCES = {f"\x1b{lead}{last}": key for last, key in _CURSOR_KEYS.items() for lead in "[O"} | {
    **dict.fromkeys(("\x1b[1~", "\x1b[7~"), "home"),
    **dict.fromkeys(("\x1b[4~", "\x1b[8~"), "end"),
    **dict.fromkeys(("\x1b[1;5C", "\x1b[1;3C", "\x1bf"), "word right"),
    **dict.fromkeys(("\x1b[1;5D", "\x1b[1;3D", "\x1bb"), "word left"),
    "\x1b[3~": "delete",
    "\x1b\x7f": "\x17",
    "\x1b\n": "new line",
}
# Control characters that do what a key does: Ctrl-B F A E P N H D, and Backspace.
_CONTROLS = {"\x02": "left", "\x06": "right", "\x01": "home", "\x05": "end"}
_CONTROLS |= {"\x10": "up", "\x0e": "down", "\x08": "\x7f", "\x04": "delete"}
_KEY = re.compile(
    r"\x1b\[200~(?P<paste>.*?)\x1b\[201~"  # bracketed paste
    r"|\x1b\[(?!200~)[0-?]*[ -/]*[@-~]|\x1bO.|\x1b[^\[O]"  # control sequences, Alt with a key
    r"|[^\x1b]",
    re.DOTALL,
)


class Keys:
    """Cuts what a terminal sends into keys; sequences may come in several parts."""

    def __init__(self) -> None:
        self._rest = ""

    @property
    def unfinished(self) -> bool:
        """Whether the last key is not whole yet."""
        return bool(self._rest)

    def push(self, text: str) -> Iterator[str]:
        """Take more input; yield the keys that are whole. Unknown sequences are no keys."""
        text, at = self._rest + text, 0
        while match := _KEY.match(text, at):
            at = match.end()
            if match["paste"] is not None:
                yield _PASTE + match["paste"]
            elif not match[0].startswith("\x1b"):
                yield match[0]
            elif match[0] in _SEQUENCES:
                yield _SEQUENCES[match[0]]
        self._rest = text[at:]

    def drop(self) -> None:
        """Give up on an unfinished sequence: it was the Escape key."""
        if not self._rest.startswith("\x1b[200~"):
            self._rest = ""


class LineEditor:
    """One line (pasted text may make it several) with a cursor in it, and the lines before.

    Attributes:
        text, cursor: what was typed, and where in it the next character goes.
    """

    def __init__(self, history: list[str]) -> None:
        self.text, self.cursor = "", 0
        self._history, self._place, self._typed = history, len(history), ""
        self._keys = {
            "left": self._left,
            "right": self._right,
            "word left": lambda: self._move(self._word_start()),
            "word right": lambda: self._move(self._word_end()),
            "home": lambda: self._move(0),
            "end": lambda: self._move(len(self.text)),
            "\x7f": self._backspace,
            "delete": self._delete,
            "\x0b": lambda: self._cut(self.cursor, len(self.text)),  # Ctrl-K
            "\x15": lambda: self._cut(0, self.cursor),  # Ctrl-U
            "\x17": lambda: self._cut(self._word_start(), self.cursor),  # Ctrl-W
            "up": lambda: self._recall(self._place - 1),
            "down": lambda: self._recall(self._place + 1),
            "new line": lambda: self._insert("\n"),
        }

    def press(self, key: str) -> None:
        """Do what a key does; unknown keys do nothing."""
        key = _CONTROLS.get(key, key)
        if key in self._keys:
            self._keys[key]()
        elif key.startswith(_PASTE):
            self._insert(re.sub("\r\n?", "\n", key.removeprefix(_PASTE)))
        elif len(key) == 1:
            self._insert(key)

    def _insert(self, text: str) -> None:
        text = "".join(c for c in text.expandtabs(4) if c == "\n" or not is_control(c))
        self.text = self.text[: self.cursor] + text + self.text[self.cursor :]
        self.cursor += len(text)

    def _cut(self, start: int, stop: int) -> None:
        self.text = self.text[:start] + self.text[stop:]
        self.cursor = start

    def _move(self, cursor: int) -> None:
        self.cursor = cursor

    def _left(self) -> None:
        """Go back by one character with all the marks on it."""
        while self.cursor > 0:
            self.cursor -= 1
            if width(self.text[self.cursor]) > 0:
                return

    def _right(self) -> None:
        while self.cursor < len(self.text):
            self.cursor += 1
            if self.cursor == len(self.text) or width(self.text[self.cursor]) > 0:
                return

    def _backspace(self) -> None:
        end = self.cursor
        self._left()
        self._cut(self.cursor, end)

    def _delete(self) -> None:
        start = self.cursor
        self._right()
        self._cut(start, self.cursor)

    def _word_start(self) -> int:
        before = self.text[: self.cursor].rstrip()
        return len(before) - len(re.split(r"\s", before)[-1])

    def _word_end(self) -> int:
        match = re.compile(r"\s*\S*").match(self.text, self.cursor)
        return match.end() if match else self.cursor

    def _recall(self, place: int) -> None:
        """Go to another line of the history; its end is the line that was being typed."""
        if not 0 <= place <= len(self._history):
            return
        if self._place == len(self._history):
            self._typed = self.text
        self._place = place
        self.text = [*self._history, self._typed][place]
        self.cursor = len(self.text)

    def rows(self, prompt: str, columns: int) -> tuple[list[str], int, int]:
        """Lay the line out on a screen.

        Args:
            prompt: in front of it; lines after the first are indented alike.
            columns: width of the screen.

        Returns:
            The rows, and the row and column of the cursor.
        """
        rows, used, cursor = [prompt], len(prompt), (0, len(prompt))
        for i, char in enumerate(self.text):
            if char == "\n":
                rows.append(" " * len(prompt))
                used = len(prompt)
            else:
                if used + width(char) > columns:
                    rows.append("")
                    used = 0
                rows[-1] += char
                used += width(char)
            if i + 1 == self.cursor:
                cursor = (len(rows) - 1, used)
        if cursor[1] >= columns:  # behind the last column is the beginning of the next row
            cursor = (cursor[0] + 1, 0)
            if cursor[0] == len(rows):
                rows.append("")
        return rows, *cursor


def width(char: str) -> int:
    """Return how many columns a character takes: two for East Asian ones, none for marks."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def is_control(char: str) -> bool:
    """Tell whether a character would command a terminal instead of being shown."""
    return unicodedata.category(char) == "Cc"
