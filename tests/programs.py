"""Runs our programs as a user does: under torchrun or alone, at a terminal or through pipes."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
GENERATE = str(ROOT / "launch" / "generate.py")
ALONE = [sys.executable]
HANG_SECONDS = 120.0  # nothing here takes a tenth of it


def torchrun(num_ranks: int) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, "--nproc-per-node", str(num_ranks)]


def environment() -> dict[str, str]:
    """What a user's shell has: no kernel runs in Triton's interpreter there."""
    usual = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return usual | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}


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


class AtTerminal:
    """A program in the foreground of a terminal, as a shell would start it there.

    Attributes:
        seen: everything it has written, without the commands to the terminal.
    """

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x28\0\x50\0\0\0\0\0")  # 40 lines of 80
        self._slave = slave  # stays open, so that the terminal outlives the program
        self._modes = termios.tcgetattr(slave)
        self._at, self.seen = 0, ""
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(),
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
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """Wait until the program writes this; return what it wrote since the last call."""
        deadline = time.monotonic() + HANG_SECONDS
        while text not in self.seen[self._at :]:
            assert time.monotonic() < deadline, f"no {text!r} after:\n{self.seen[-2000:]}"
            assert self.process.poll() is None or self._read(), f"ended:\n{self.seen[-2000:]}"
            self._read()
        end = self.seen.index(text, self._at) + len(text)
        before, self._at = self.seen[self._at : end], end
        return before

    def wait(self) -> int:
        """Wait for the end of the program; return its exit code."""
        deadline = time.monotonic() + HANG_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"does not end after:\n{self.seen[-2000:]}"
            self._read()
        return self.process.returncode

    def modes_are_restored(self) -> bool:
        """Tell whether the terminal is as it was before; a guard may need a moment for that."""
        deadline = time.monotonic() + HANG_SECONDS
        while termios.tcgetattr(self._slave) != self._modes:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 0.1)[0]:
            return False
        text = os.read(self._master, 65536).decode(errors="replace")
        self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
        return True
