r"""Where a chat happens: on a terminal, or line by line where there is none.

torchrun sits in the foreground of the terminal and ends all ranks at Ctrl-C. So while we have the
terminal, Ctrl-C (and Ctrl-Z) come as characters; Ctrl-\ still ends everything.
"""

import codecs
import contextlib
import os
import select
import subprocess
import sys
import termios
from collections import deque
from typing import Self

from dsv3.errors import OutputError, os_errors_as, printable
from dsv3.serve.line_editor import Keys, LineEditor, is_control

PROMPT = ">>> "
_CTRL_C, _CTRL_D, _CTRL_L = "\x03", "\x04", "\x0c"
_GONE = "gone"  # the key that a closed terminal sends
_SEQUENCE_SECONDS = 0.1  # between the characters of one key
_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"
_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # pasted text comes marked as such


class Lines(contextlib.AbstractContextManager["Lines"]):
    """Standard input line by line; answers go to standard output, all else to standard error."""

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> str | None:
        """Read a line."""
        if sys.__stdin__ is None:  # closed
            return None
        if sys.stdin.isatty():
            _write(sys.stderr.fileno(), PROMPT)
        line = sys.stdin.buffer.readline()
        return line.decode(errors="replace").rstrip("\r\n") if line else None

    def show(self, text: str) -> None:
        """Write to standard error."""
        _write(sys.stderr.fileno(), printable(text) + "\n")

    def note(self, text: str) -> None:
        """Write to standard error."""
        self.show(f"({text})")

    def answer(self, text: str) -> None:
        """Write more of an answer, as it is unless that may command a terminal."""
        is_terminal = sys.stdout.isatty()
        _write(sys.stdout.fileno(), harmless(text) if is_terminal else text)

    thought = answer  # what the model thinks before it answers

    def end_answer(self, remark: str) -> None:
        """End the line, with a remark if there is something to say of the answer."""
        _write(sys.stdout.fileno(), "\n")
        if remark:
            self.note(remark)

    def interrupted(self) -> bool:
        """Tell that the answer goes on: Ctrl-C ends the program where there is no terminal."""
        return False


class Terminal:
    """A terminal with a line editor. Use as a context manager: it gives the modes back."""

    def __init__(self) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._keys, self._ahead = Keys(), deque[str]()
        self._history: list[str] = []
        self._row = 0  # of the cursor, counted from the prompt's
        self._in_line = False  # whether what was written last has not ended its line

    def __enter__(self) -> Self:
        self._modes = termios.tcgetattr(self._in)
        self._guard = _guard(self._in)
        modes = termios.tcgetattr(self._in)
        off = os.fpathconf(self._in, "PC_VDISABLE").to_bytes(1, sys.byteorder)
        modes[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        modes[6][termios.VINTR] = modes[6][termios.VSUSP] = off
        termios.tcsetattr(self._in, termios.TCSADRAIN, modes)
        _write(self._out, _PASTE_ON)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OutputError, termios.error):  # it may be gone
            _write(self._out, _PASTE_OFF)
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._modes)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()

    def read(self) -> str | None:
        """Let the user type a line; Ctrl-C empties it, Ctrl-D in an empty one ends the chat."""
        editor, self._row = LineEditor(self._history), 0
        while True:
            if not self._ahead:
                self._draw(editor)
            key = self._next_key()
            if key == _GONE or (key == _CTRL_D and not editor.text):
                self._leave(editor)
                return None
            if key in ("\n", "\r"):
                self._leave(editor)
                if editor.text.strip() and editor.text not in self._history[-1:]:
                    self._history.append(editor.text)
                return editor.text
            if key == _CTRL_C:
                self._leave(editor, "^C")
                if not editor.text:
                    self.note("Ctrl-D or /exit leaves the chat")
                editor, self._row = LineEditor(self._history), 0
            elif key == _CTRL_L:
                _write(self._out, "\x1b[H\x1b[2J")
                self._row = 0
            else:
                editor.press(key)

    def show(self, text: str) -> None:
        """Write lines."""
        _write(self._out, printable(text) + "\n")

    def note(self, text: str) -> None:
        """Write a dimmed remark on a line of its own."""
        _write(self._out, f"{_DIM}({printable(text)}){_PLAIN}\n")

    def answer(self, text: str) -> None:
        """Write what the model says, but let it not command the terminal."""
        text = harmless(text)
        _write(self._out, text)
        self._in_line = not text.endswith("\n") if text else self._in_line

    def thought(self, text: str) -> None:
        """Write dimmed."""
        if text:
            _write(self._out, _DIM)
            self.answer(text)
            _write(self._out, _PLAIN)

    def end_answer(self, remark: str) -> None:
        """End the line if it has not ended, and leave one blank."""
        if self._in_line:
            _write(self._out, "\n")
            self._in_line = False
        if remark:
            self.note(remark)
        _write(self._out, "\n")

    def interrupted(self) -> bool:
        """Look for Ctrl-C among the keys; others are for the next line."""
        self._receive(0)
        others = [key for key in self._ahead if key != _CTRL_C]
        found = len(others) < len(self._ahead)
        self._ahead = deque(others)
        return found or _GONE in others

    def _next_key(self) -> str:
        while not self._ahead:
            self._receive(_SEQUENCE_SECONDS if self._keys.unfinished else None)
        return self._ahead.popleft()

    def _receive(self, seconds: float | None) -> None:
        """Take in what was typed; wait for it at most so long."""
        if not select.select([self._in], [], [], seconds)[0]:
            if seconds:
                self._keys.drop()
            return
        try:
            data = os.read(self._in, 4096)
        except OSError:
            data = b""
        self._ahead.extend(self._keys.push(self._decoder.decode(data)) if data else [_GONE])

    def _draw(self, editor: LineEditor) -> None:
        """Draw the line anew, as much of it as fits the screen."""
        columns, height = _size(self._out)
        rows, row, column = editor.rows(PROMPT, columns)
        top = max(0, row - height + 1)
        rows, row = rows[top : top + height], row - top
        _write(
            self._out,
            _up(self._row)
            + "\r\x1b[J"
            + "\r\n".join(rows)
            # The cursor is behind the last row now.
            + _up(len(rows) - 1 - row)
            + "\r"
            + (f"\x1b[{column}C" if column else ""),
        )
        self._row = row

    def _leave(self, editor: LineEditor, mark: str = "") -> None:
        """Go to the line after the typed one."""
        editor.cursor = len(editor.text)
        self._draw(editor)
        _write(self._out, mark + "\r\n")


Console = Terminal | Lines


def open_console() -> Console:
    """Return the terminal if input and output are one, and it can do more than print."""
    able = os.environ.get("TERM", "dumb") != "dumb"
    ends = (sys.stdin, sys.stdout)  # None where they were closed
    return Terminal() if able and all(end and end.isatty() for end in ends) else Lines()


def _guard(terminal: int) -> subprocess.Popen[bytes] | None:
    """Start a process that gives the terminal its modes back if this one dies without doing so.

    Reading from us, it waits until we write no more: no way to die escapes it.
    """
    script = f"read -r _; stty \"$0\" <&1; printf '{_PASTE_OFF}{_PLAIN}\\n'"
    try:
        modes = subprocess.check_output(["stty", "-g"], stdin=terminal, text=True).strip()
        return subprocess.Popen(
            ["sh", "-c", script, modes],
            stdin=subprocess.PIPE,
            stdout=terminal,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _write(fd: int, text: str) -> None:
    data = memoryview(text.encode(errors="replace"))
    with os_errors_as(OutputError, "standard output: cannot write"):
        while data:
            data = data[os.write(fd, data) :]


def _size(fd: int) -> tuple[int, int]:
    """Return columns and lines; some terminals do not know them."""
    with contextlib.suppress(OSError):
        columns, lines = os.get_terminal_size(fd)
        if columns and lines:
            return columns, lines
    return 80, 24


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows > 0 else ""


def harmless(text: str) -> str:
    """Return `text` without characters that a terminal obeys, apart from newlines and tabs."""
    return "".join(char for char in text if char in "\n\t" or not is_control(char))
