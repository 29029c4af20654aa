"""Runs our programs in forks of a process that has imported torch, which takes seconds each time.

For tests of what a program answers, writes and says. Tests of processes (signals, kills, terminals,
closed streams, torchrun) start real ones: `tests/programs.py`.
"""

import multiprocessing
import os
import runpy
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

from tests.programs import HANG_SECONDS, ROOT, environment, free_port

# They import nearly all that programs, and functions of tests on several ranks, need.
_PRELOADED = ["generate", "pytest", "tests.forked"]
# A process that starts looks for others that have ended. Only one thread can read an exit code: a
# second one would take the process for one that lost its fork server.
_process_lock = threading.Lock()


class Streams(NamedTuple):
    """A program's ends of the pipes that are its standard streams."""

    stdin: Connection
    stdout: Connection
    stderr: Connection


class Forked:
    """A script that runs with its arguments in a process of its own."""

    def __init__(self, command: list[str], stdin: str, variables: dict[str, str]) -> None:
        self._command = command
        context = fork_server()
        read_stdin, write_stdin = context.Pipe(duplex=False)
        read_stdout, write_stdout = context.Pipe(duplex=False)
        read_stderr, write_stderr = context.Pipe(duplex=False)
        streams = Streams(read_stdin, write_stdout, write_stderr)
        arguments = (command, environment() | variables, streams)
        self.process = context.Process(target=_main, args=arguments)
        with _process_lock:
            self.process.start()
        for end in streams:
            end.close()
        self._pool = ThreadPoolExecutor(3)
        self._pool.submit(_write, write_stdin, stdin)
        self._texts: list[Future[str]] = [
            self._pool.submit(_read, end) for end in (read_stdout, read_stderr)
        ]

    def finish(self, seconds: float = HANG_SECONDS) -> CompletedProcess[str]:
        """Wait until the program ends; kill it if it takes longer than `seconds`."""
        has_ended = wait([self.process.sentinel], seconds)
        with _process_lock:
            if not has_ended:
                self.process.kill()
            self.process.join()
        stdout, stderr = (text.result() for text in self._texts)
        self._pool.shutdown()
        assert self.process.exitcode is not None
        return CompletedProcess(self._command, self.process.exitcode, stdout, stderr)


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Return the context of the server that all tests share."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_forked(
    command: list[str],
    stdin: str = "",
    num_ranks: int = 1,
    seconds: float = HANG_SECONDS,
    **variables: str,
) -> CompletedProcess[str]:
    """Run a script with its arguments: alone, or on ranks, whose outputs follow one another.

    The exit code is the first that is not 0. The first rank alone gets `stdin`.
    """
    if num_ranks == 1:
        return Forked(command, stdin, variables).finish(seconds)
    ranks = [
        Forked(command, "" if rank else stdin, variables | world)
        for rank, world in enumerate(worlds_of(num_ranks))
    ]
    done = [rank.finish(seconds) for rank in ranks]
    code = next((each.returncode for each in done if each.returncode), 0)
    stdout = "".join(each.stdout for each in done)
    stderr = "".join(each.stderr for each in done)
    return CompletedProcess(command, code, stdout, stderr)


def worlds_of(num_ranks: int) -> list[dict[str, str]]:
    """Return the environment variables of ranks on this host, as torchrun sets them."""
    common = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _write(end: Connection, text: str) -> None:
    with end, open(end.fileno(), "w", closefd=False) as stream:
        stream.write(text)


def _read(end: Connection) -> str:
    with end, open(end.fileno(), closefd=False) as stream:
        return stream.read()


def _main(command: list[str], variables: dict[str, str], streams: Streams) -> None:
    """Become the program, with its streams, environment, arguments and folder of modules."""
    for number, end in enumerate(streams):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
