"""Runs our programs as a user does: under torchrun or alone, at a terminal or through pipes."""

import codecs
import contextlib
import fcntl
import os
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

from prompt_toolkit.utils import get_cwidth

ROOT = Path(__file__).resolve().parents[1]
GENERATE = str(ROOT / "launch" / "generate.py")
ALONE = [sys.executable]
HANG_SECONDS = 120.0  # nothing here takes a tenth of it
_OUTPUT = re.compile(r"\x1b\[(?P<number>\d*)[\d;?]*(?P<command>[A-Za-z])|\x1b[^\[]|[^\x1b]")


def torchrun(num_ranks: int) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, "--nproc-per-node", str(num_ranks)]


def environment() -> dict[str, str]:
    """The environment of a user's shell, without Triton's interpreter."""
    usual = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    return usual | own | {"XDG_STATE_HOME": os.devnull}  # not the state of who runs the tests


def free_port() -> int:
    """Return a free port, below those that the system gives to other programs meanwhile."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def run(command: list[str], stdin: str = "", **more: object) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end; it must end."""
    return subprocess.run(
        command,
        input=stdin,
        text=True,
        capture_output=True,
        env=environment(),
        timeout=HANG_SECONDS,
        cwd=ROOT,
        **more,  # type: ignore[call-overload]
    )


def our_lines(stderr: str) -> list[str]:
    """Return what our program wrote to standard error, before torchrun's report."""
    before = re.split(r"^E\d{4} ", stderr, maxsplit=1, flags=re.MULTILINE)[0]
    return [line for line in before.splitlines() if not re.match(r"[WI]\d{4} ", line)]


def ranks_of(torchrun_pid: int) -> dict[int, int]:
    """Return the processes of the ranks that a torchrun has started, by rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == torchrun_pid:
                rank = re.search(rb"\0RANK=(\d+)", (stat.parent / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(stat.parent.name)
    return found


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a torchrun and its ranks."""
    for pid in [*ranks_of(process.pid).values(), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


class Screen:
    """The screen of a terminal of unlimited size: no wrapped lines and no scrolling."""

    def __init__(self) -> None:
        self._lines: list[list[str]] = [[]]  # of cells; a wide character has an empty one behind
        self._row = 0
        self._column = 0
        self._rest = ""

    @property
    def text(self) -> str:
        self._cells(self._column)
        return "\n".join("".join(line) for line in self._lines)

    def write(self, text: str) -> None:
        text, at = self._rest + text, 0
        while match := _OUTPUT.match(text, at):
            at = match.end()
            if match["command"]:
                self._obey(match["command"], int(match["number"] or 0))
            elif match[0] == "\n":
                self._row += 1
                self._cells(0)
            elif match[0] == "\r":
                self._column = 0
            elif not match[0].startswith("\x1b"):
                self._put(match[0])
        self._rest = text[at:]

    def _cells(self, number: int) -> list[str]:
        """Return the cells of the cursor's line, at least `count` of them."""
        self._lines += [[] for _ in range(self._row + 1 - len(self._lines))]
        line = self._lines[self._row]
        line += " " * (number - len(line))
        return line

    def _put(self, char: str) -> None:
        line, width = self._cells(self._column), get_cwidth(char)
        if width:
            line[self._column : self._column + width] = [char, *[""] * (width - 1)]
            self._column += width
        else:
            line[self._column - 1] += char

    def _obey(self, command: str, number: int) -> None:
        if command == "A":
            self._row = max(0, self._row - max(1, number))
        elif command in "CD":
            step = max(1, number) * (1 if command == "C" else -1)
            self._column = max(0, self._column + step)
        elif command in "JK":
            del self._cells(0)[self._column :]
            if command == "J":
                del self._lines[self._row + 1 :]


class AtTerminal:
    """A program in the foreground of a terminal, as a shell would start it there.

    Attributes:
        seen: everything that it has left on the screen.
        raw: everything that it has written.
    """

    def __init__(self, command: list[str], **variables: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x28\0\x50\0\0\0\0\0")  # 40 lines of 80
        self._slave = slave  # stays open, so that the terminal outlives the program
        self._modes = termios.tcgetattr(slave)
        self._at = 0
        self._screen = Screen()
        self.seen = ""
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment() | variables,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # signals go to its group
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self.process)
        os.close(self._master)
        os.close(self._slave)

    def type(self, keys: str) -> None:
        data = keys.encode()
        while data:  # it may wait for us to read
            data = data[os.write(self._master, data[:500]) :]
            while data and self._read(0.0):
                pass

    def resize(self, columns: int) -> None:
        """Change the width; the kernel signals the program."""
        size = struct.pack("HHHH", 40, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def wait_for(self, text: str) -> str:
        """Wait until this is on the screen; return what has come there since the last call.

        The line that the last call ended in counts anew: typed text is added to it.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while text not in self.seen[(begin := self.seen.rfind("\n", 0, self._at) + 1) :]:
            assert time.monotonic() < deadline, f"no {text!r} after:\n{self.seen[-2000:]}"
            assert self.process.poll() is None or self._read(), f"ended:\n{self.seen[-2000:]}"
            self._read()
        self._at = self.seen.index(text, begin) + len(text)
        return self.seen[begin : self._at]

    def wait(self) -> int:
        """Wait for the end of the program; return its exit code."""
        deadline = time.monotonic() + HANG_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"does not end after:\n{self.seen[-2000:]}"
            self._read()
        return self.process.returncode

    def modes_are_restored(self) -> bool:
        """Return True if the terminal is restored; the guard process may need a moment."""
        deadline = time.monotonic() + HANG_SECONDS
        while termios.tcgetattr(self._slave) != self._modes:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _read(self, seconds: float = 0.1) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        text = self._decoder.decode(os.read(self._master, 65536))
        self.raw += text
        self._screen.write(text)
        before, self.seen = self.seen[: self._at], self._screen.text
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, self.seen, strict=False))
        self._at = sum(1 for _ in same)  # the end may have been drawn anew
        return True
