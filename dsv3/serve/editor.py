r"""Console on a terminal: prompt_toolkit edits messages, answers are written as they stream.

torchrun is in the terminal's foreground group and ends all ranks at Ctrl-C. So while a chat uses
the terminal, Ctrl-C and Ctrl-Z arrive as characters; Ctrl-\ still ends all processes.
"""

import asyncio
import codecs
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Self

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import History
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.renderer import Renderer

from dsv3.errors import OutputError, os_errors_as, printable
from dsv3.serve.input_history import InputHistory
from dsv3.serve.terminal import BLOCK_HELP, PROMPT, harmless, is_mark, write

HELP = f"""\
Enter sends a message; Alt-Enter, or Esc and then Enter, begins a new line.
{BLOCK_HELP}
Ctrl-C stops an answer and drops text typed ahead. Arrow keys bring back
earlier messages, also of earlier chats (--no-history keeps none)."""
_DIM = "\x1b[2m"
_PLAIN = "\x1b[22m"
# Bracketed paste.
_PASTE_ON = "\x1b[?2004h"
_PASTE_OFF = "\x1b[?2004l"
# No bold or dimmed text, lines wrap, the cursor is visible, no bracketed paste.
_RESTORED = f"\x1b[0m\x1b[?7h\x1b[?25h{_PASTE_OFF}"


class Terminal:
    """A terminal with a line editor; a context manager that restores the terminal's modes.

    Args:
        history: messages of earlier chats.
    """

    help = HELP

    def __init__(self, history: InputHistory) -> None:
        self._in = sys.stdin.fileno()
        self._out = sys.stdout.fileno()
        self._is_mid_line = False  # the last written text has not ended its line
        self._input = _Input(sys.stdin)
        # UTF-8 like answers, independent of the locale.
        screen = os.fdopen(self._out, "w", encoding="utf-8", errors="replace", closefd=False)
        output = _Output.from_pty(screen, term=os.environ.get("TERM"))
        output.enable_cpr = False  # the reply would be mixed with the user's keys
        self._session: PromptSession[str] = PromptSession(
            [("fg:ansidefault", PROMPT)],  # spaces at a line's end are only drawn with a color
            prompt_continuation=lambda width, _, wraps: "" if wraps else " " * width,
            input_processors=[TabsProcessor(tabstop=8, char1=" ", char2=" ")],
            key_bindings=_key_bindings(),
            history=_History(history),
            reserve_space_for_menu=0,
            include_default_pygments_style=False,
            input=self._input,
            output=output,
        )
        app = self._session.app
        app.renderer = _Renderer(app.renderer.style, output)
        app.terminal_size_polling_interval = None  # SIGWINCH reports changes

    def __enter__(self) -> Self:
        logging.getLogger("asyncio").setLevel(logging.INFO)  # --debug is not about event loops
        self._modes = termios.tcgetattr(self._in)
        self._restorer = _start_restorer(self._in)
        modes = termios.tcgetattr(self._in)
        off = os.fpathconf(self._in, "PC_VDISABLE").to_bytes(1, sys.byteorder)
        modes[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
        modes[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        modes[6][termios.VMIN] = 1
        modes[6][termios.VTIME] = 0
        modes[6][termios.VINTR] = off
        modes[6][termios.VSUSP] = off
        termios.tcsetattr(self._in, termios.TCSADRAIN, modes)
        write(self._out, _PASTE_ON)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OutputError, termios.error):  # the terminal may be closed
            write(self._out, _RESTORED)
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._modes)
        if self._restorer is not None:
            self._restorer.kill()
            self._restorer.communicate()

    def read(self) -> str | None:
        """Read a message; Ctrl-C drops the text, Ctrl-D in an empty message ends the chat."""
        self.interrupted()
        while not self._input.closed:
            try:
                with _wakeup_fd_kept(), os_errors_as(OutputError, "terminal"):
                    text = self._session.prompt(
                        pre_run=self._begin, set_exception_handler=False, handle_sigint=False
                    )
            except EOFError:
                return None
            except _Dropped as dropped:
                if not dropped.text:
                    self.note("Ctrl-D or /exit leaves the chat")
            else:
                return _without_marks(text)
        return None

    def show(self, text: str) -> None:
        """Write lines."""
        write(self._out, printable(text) + "\n")

    def note(self, text: str) -> None:
        """Write a dimmed remark on its own line."""
        write(self._out, f"{_DIM}({printable(text)}){_PLAIN}\n")

    def answer(self, text: str) -> None:
        """Write more of an answer."""
        text = harmless(text)
        write(self._out, text)
        if text:
            self._is_mid_line = not text.endswith("\n")

    def thought(self, text: str) -> None:
        """Write more of a thought, dimmed."""
        if text:
            write(self._out, _DIM)
            self.answer(text)
            write(self._out, _PLAIN)

    def end_answer(self, remark: str) -> None:
        """End the current line, write a remark and a blank line."""
        if self._is_mid_line:
            write(self._out, "\n")
            self._is_mid_line = False
        if remark:
            self.note(remark)
        write(self._out, "\n")

    def interrupted(self) -> bool:
        """Return True if Ctrl-C was typed; drop the keys before it, keep others for the prompt."""
        keys = get_typeahead(self._input)
        while new_keys := self._input.read_keys():
            keys += new_keys
        stops = [i for i, key in enumerate(keys) if key.key == Keys.ControlC]
        store_typeahead(self._input, keys[stops[-1] + 1 :] if stops else keys)
        return bool(stops) or self._input.closed

    def _begin(self) -> None:
        """Prepare the application once its event loop runs."""
        app = self._session.app
        loop = asyncio.get_running_loop()

        def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if app.is_running and not app.is_done:
                app.exit(exception=context.get("exception") or RuntimeError(context["message"]))

        def type_ahead() -> None:
            app.key_processor.feed_multiple(keys)
            app.key_processor.process_keys()

        loop.set_exception_handler(fail)
        # Keys typed ahead may request earlier messages, which are loaded by a task.
        keys = get_typeahead(self._input)
        self._session.default_buffer.load_history_if_not_yet_loaded()
        loop.call_soon(type_ahead)


class _Dropped(Exception):
    """Ctrl-C at the prompt, with the text that was dropped."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _History(History):
    """Messages of this chat and of earlier ones."""

    def __init__(self, history: InputHistory) -> None:
        super().__init__()
        self._history = history

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._history.load())

    def store_string(self, string: str) -> None:
        self._history.append(string)


class _Reader(PosixStdinReader):
    """Reads UTF-8, and detects a closed terminal."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, count: int = 1 << 16) -> str:
        if self.closed or not select.select([self.stdin_fd], [], [], 0)[0]:
            return ""
        try:
            data = os.read(self.stdin_fd, count)
        except OSError:
            data = b""
        self.closed = not data
        return self._decoder.decode(data)


class _Input(Vt100Input):
    """The terminal's keys; the modes are set by `Terminal` for the whole chat."""

    def __init__(self, stdin: Any) -> None:
        super().__init__(stdin)
        self.stdin_reader = _Reader(self._fileno)

    def read_keys(self) -> list[KeyPress]:
        """Return the keys; characters that arrive together are inserted together, as if pasted.

        The first one stays a separate key, since it may complete a key sequence.
        """
        keys: list[KeyPress] = []
        for is_text, group in groupby(super().read_keys(), _is_character):
            run = list(group)
            if is_text and len(run) > 2:
                text = "".join(key.data for key in run[1:])
                run = [run[0], KeyPress(Keys.BracketedPaste, text)]
            keys += run
        return keys

    def raw_mode(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _is_character(key: KeyPress) -> bool:
    return not isinstance(key.key, Keys)


class _Output(Vt100_Output):
    """The screen; bracketed paste stays on between prompts, for text pasted ahead."""

    def disable_bracketed_paste(self) -> None:
        pass


class _Renderer(Renderer):
    """Renders the edited message."""

    def erase(self, leave_alternate_screen: bool = True) -> None:
        """Erase the message, also after a narrower window has wrapped its rows."""
        screen = self.last_rendered_screen
        if screen is not None:
            columns = self.output.get_size().columns
            cursor = self._cursor_pos
            above = [screen.data_buffer[y] for y in range(cursor.y)]
            lengths = [max((x for x in row if row[x].char != " "), default=0) for row in above]
            num_wrapped = sum(length // columns for length in lengths) + cursor.x // columns
            self.output.cursor_up(num_wrapped)
        super().erase(leave_alternate_screen)


def _key_bindings() -> KeyBindings:
    """Return the key bindings beyond prompt_toolkit's own."""
    keys = KeyBindings()

    in_block = Condition(lambda: _is_open_block(get_app().current_buffer.text))

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER) & in_block)
    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("tab")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\t")

    @keys.add("c-u")  # also over several lines
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        event.app.clipboard.set_text(buffer.delete_before_cursor(buffer.cursor_position))

    @keys.add("c-z")
    def _(event: KeyPressEvent) -> None:
        pass

    @keys.add("c-c", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        dropped = _Dropped(buffer.text)
        buffer.cursor_position = len(buffer.text)
        buffer.insert_text("^C")
        event.app.exit(exception=dropped)

    return keys


def _is_open_block(text: str) -> bool:
    """Return True if the first line is a mark and no other line is a mark."""
    first, *lines = text.split("\n") if text.startswith('"') else [""]
    return is_mark(first) and not any(map(is_mark, lines))


def _without_marks(text: str) -> str:
    """Return the lines between two marks; other text unchanged."""
    lines = text.split("\n") if text.startswith('"') else []
    marks = [i for i, line in enumerate(lines) if is_mark(line)]
    return "\n".join(lines[1:-1]) if marks == [0, len(lines) - 1] else text


@contextlib.contextmanager
def _wakeup_fd_kept() -> Iterator[None]:
    """Restore the wake-up descriptor of signals afterwards, which an event loop replaces."""
    fd = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)


def _start_restorer(terminal: int) -> subprocess.Popen[bytes] | None:
    """Start a process that restores the terminal's modes if this process dies without doing so.

    It waits for the end of a pipe from this process, which closes however this process ends.
    """
    script = f"read -r _; stty \"$0\" <&1; printf '{_RESTORED}\\n'"
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
