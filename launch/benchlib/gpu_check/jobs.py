"""Commands in separate processes, within a time limit; a hang or a crash costs one case."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchlib.case_log import CaseLog, CaseResults, read_results
from dsv3.errors import one_line

_POLL = 0.1
# A process that is asked to end has this many seconds; torchrun ends its ranks in them.
_GRACE = 5.0
# Less time than this starts no process.
_LEAST = 3.0


class Budget:
    """The seconds of a whole check.

    Args:
        seconds: all of them.
        reserve: seconds that are kept for writing the results.
    """

    def __init__(self, seconds: float, reserve: float = 5.0) -> None:
        self.seconds = seconds
        self._reserve = min(reserve, seconds / 4)
        self._begin = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        """Seconds that may still be used."""
        return self.seconds - self._reserve - self.spent


@dataclass(frozen=True, slots=True)
class Job:
    """A command of one part.

    Attributes:
        name: names its files.
        argv: the command.
        log: file of its output.
        cwd: directory it runs in.
        rows: its case log, if it has one; another process continues it after a case that ended
            the one before.
        env: environment variables.
        silence: seconds after which it counts as hung, if its case log (its output, if it has
            none) does not grow.
        tries: largest number of processes.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    cwd: Path
    rows: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    silence: float = 120.0
    tries: int = 6


@dataclass(slots=True)
class JobResult:
    """The result of a job.

    Attributes:
        code: exit code of the last process, negative for a signal; None if none was started.
        seconds: time of all its processes.
        cut: the reason why it was ended early; empty if it ended by itself.
    """

    job: Job
    code: int | None = None
    seconds: float = 0.0
    cut: str = ""

    @property
    def out_of_time(self) -> bool:
        """True if the time limit ended it, or did not let it start."""
        return self.cut.endswith("out of time")

    @property
    def fault(self) -> str:
        """Failure in one line with the end of its output; empty for exit code 0."""
        if self.code == 0 and not self.cut:
            return ""
        if self.cut.startswith("not started"):
            return self.cut
        return f"{self.cut or describe_exit(self.code)}: {reason_in(self.job.log)}"


def describe_exit(code: int | None) -> str:
    """Return an exit code in words."""
    if code is None:
        return "not started"
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended by signal {-code}"


def reason_in(log: Path) -> str:
    """Return the last error line of the output of the last process, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("$ ")]
    output = [line.strip() for line in lines[begins[-1] + 1 :] if line.strip()] if begins else []
    errors = [line for line in output if line.startswith("error: ")]
    return one_line((errors or output or ["no output"])[-1])


class _Run:
    """A job that runs."""

    def __init__(self, job: Job) -> None:
        self.result = JobResult(job)
        self._num_tries = 0
        self._begin = time.monotonic()
        self._start()

    def _start(self) -> None:
        job = self.result.job
        with job.log.open("ab") as log:
            log.write(f"$ {shlex.join(job.argv)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                job.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env=os.environ | job.env,
                start_new_session=True,  # so that the processes it starts end with it
            )
        self._num_tries += 1
        self._size = -1
        self._grown = time.monotonic()

    @property
    def is_alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def poll(self) -> bool:
        """Return True while the job runs; start another process for the cases that are left."""
        if self.result.cut:
            return False
        code = self._process.poll()
        if code is None and not self._is_silent():
            return True
        hung = code is None
        if hung:
            self.end("")
        self.result.code = self._process.returncode
        self.result.seconds = time.monotonic() - self._begin
        if self._can_continue(hung):
            self._start()
            return True
        return False

    def _is_silent(self) -> bool:
        """Return True if the process has written nothing for too long."""
        job = self.result.job
        file = job.rows or job.log
        size = file.stat().st_size if file.exists() else 0
        if size != self._size:
            self._size = size
            self._grown = time.monotonic()
        return time.monotonic() - self._grown > job.silence

    def _can_continue(self, hung: bool) -> bool:
        """Record the case that ended the process; return True if other cases can still run."""
        job = self.result.job
        cut = f"hung: no output for {job.silence:.0f} s" if hung else ""
        found = CaseResults()
        if job.rows is not None and self.result.code != 0:
            found = read_results(job.rows)
            for case in found.unended:
                CaseLog(job.rows).end(case, cut or self.result.fault)
        if not found.unended and not found.has_spoiled_device:
            self.result.cut = cut
            return False
        if self._num_tries < job.tries:
            return True
        self.result.cut = f"given up after {job.tries} processes"
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self, reason: str) -> None:
        """End the process and all that it has started."""
        self.send(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self.send(signal.SIGKILL)
        try:
            self.result.code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:  # it waits in a driver
            reason = f"{reason or 'hung'}; it cannot be killed"
        self.result.cut = reason
        self.result.seconds = time.monotonic() - self._begin


def run_jobs(
    jobs: Sequence[Job],
    seconds: float,
    at_once: int,
    on_end: Callable[[JobResult], None] = lambda _: None,
) -> list[JobResult]:
    """Run jobs, at most `at_once` at the same time; return their results in the same order.

    Args:
        jobs: the commands, in the order in which they start.
        seconds: time limit of all together.
        at_once: number of jobs that run at the same time.
        on_end: called at the end of each job.
    """
    deadline = time.monotonic() + seconds
    waiting = list(jobs)
    ended: dict[str, JobResult] = {}
    running: list[_Run] = []
    with _ended_with_the_block(running):
        while waiting or running:
            left = deadline - time.monotonic()
            while waiting and len(running) < at_once and left > _LEAST:
                running.append(_Run(waiting.pop(0)))
            if left <= _LEAST:
                ended |= {
                    job.name: JobResult(job, cut="not started: out of time") for job in waiting
                }
                waiting.clear()
            if left <= 0:
                _end_all([run for run in running if run.is_alive], "out of time")
            for run in list(running):
                if not run.poll():
                    running.remove(run)
                    ended[run.result.job.name] = run.result
                    on_end(run.result)
            time.sleep(_POLL)
    return [ended[job.name] for job in jobs]


@contextmanager
def _ended_with_the_block(running: list[_Run]) -> Iterator[None]:
    """End the jobs that still run when the block is left, as by Ctrl-C."""
    try:
        yield
    finally:
        _end_all(running, "interrupted")


def _end_all(runs: Sequence[_Run], reason: str) -> None:
    """End jobs; all of them share one period of grace."""
    for run in runs:
        run.send(signal.SIGTERM)
    for run in runs:
        run.end(reason)
