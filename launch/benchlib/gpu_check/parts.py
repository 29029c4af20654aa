"""The parts of the check: the jobs of each, and how their results are judged."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib.case_log import FAILED, PASSED, SKIPPED, CaseResults, read_results
from benchlib.gpu_check.facts import Facts
from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.report import PartResult

# GPU memory of a process that checks kernels at the largest shapes, with references in float32.
_PROCESS_GIB = 8.0
_MOST_PROCESSES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The run that the parts are made for.

    Attributes:
        root: the checkout.
        out: directory of the results.
        python: the interpreter.
        facts: the machine.
        rehearse: run everything without a GPU.
        one_shot: also check sums in memory that GPUs share.
        tests: pytest arguments that replace the GPU tests; None runs all.
    """

    root: Path
    out: Path
    python: str
    facts: Facts
    rehearse: bool = False
    one_shot: bool = False
    tests: tuple[str, ...] | None = None

    @property
    def processes(self) -> int:
        """Number of jobs that check results at the same time, by cores and GPU memory."""
        if self.rehearse:
            return 1
        by_memory = int(self.facts.free_gib // _PROCESS_GIB)
        return max(1, min(self.facts.cores, by_memory, _MOST_PROCESSES))

    def rows_file(self, name: str) -> Path:
        """Return the case log of a job."""
        return self.out / "rows" / f"{name}.jsonl"

    def job(
        self,
        name: str,
        *argv: object,
        rows: Path | None = None,
        interpret: bool = False,
        silence: float = 120.0,
        threads: int = 1,
    ) -> Job:
        """Return a job of this Python.

        Args:
            name: names its files.
            argv: arguments of the interpreter.
            rows: its case log.
            interpret: run kernels in Triton's interpreter.
            silence: see `Job`.
            threads: CPU threads.
        """
        return self.command(
            name,
            self.python,
            *argv,
            rows=rows,
            silence=silence,
            env={"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": str(threads)},
        )

    def command(
        self,
        name: str,
        *argv: object,
        rows: Path | None = None,
        silence: float = 120.0,
        env: dict[str, str] | None = None,
    ) -> Job:
        """Return a job of any program."""
        if self.rehearse:
            env = (env or {}) | {"CUDA_VISIBLE_DEVICES": ""}
        return Job(
            name,
            tuple(os.fspath(a) if isinstance(a, Path) else str(a) for a in argv),
            log=self.out / "logs" / f"{name}.log",
            cwd=self.root,
            rows=rows,
            env=env or {},
            silence=silence,
        )


MakeJobs = Callable[[Setup], list[Job]]
Judge = Callable[[Setup, Sequence[JobResult], PartResult], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the check.

    Attributes:
        name: its name on the command line.
        about: help text, one line.
        limit: seconds that it may take at most.
        typical: seconds that it takes on a data-centre GPU, an estimate.
        make_jobs: returns its jobs.
        judge: fills in the part's result from the results of its jobs.
        is_timed: it measures times, so nothing else may run; others run side by side.
        by_default: it runs if no parts are named.
        unproven: the gap of its rehearsal, one line.
        lacks: returns the reason why this machine cannot run it; empty if it can.
        needs: packages that it imports; without one of them it is incomplete.
    """

    name: str
    about: str
    limit: float
    typical: float
    make_jobs: MakeJobs
    judge: Judge
    is_timed: bool = False
    by_default: bool = True
    unproven: str = ""
    lacks: Callable[[Setup], str] = lambda _: ""
    needs: tuple[str, ...] = ()

    def missing(self) -> str:
        """Return a line about the packages that are not installed; empty if all are."""
        names = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(names)} (pip install {' '.join(names)})" if names else ""


def judge_cases(results: Sequence[JobResult], part: PartResult) -> list[CaseResults]:
    """Count the cases of jobs that have case logs; return the cases of each job.

    Cases that were not reached in time make the part incomplete.
    """
    counts = dict.fromkeys((PASSED, FAILED, SKIPPED), 0)
    unfinished: list[str] = []
    every = []
    for result in results:
        assert result.job.rows is not None
        found = read_results(result.job.rows)
        every.append(found)
        for row in found.rows:
            counts[row["result"]] += 1
        for row in found.failed:
            part.fail(f"{row['case']}: {row['why']}")
        if result.out_of_time:
            unfinished += found.unended or [result.job.name]
        elif result.fault and (result.cut or not found.failed):
            part.fail(f"{result.job.name}: {result.fault}")
    if not sum(counts.values()) and not unfinished and not part.problems:
        part.fail("no case has run")
    part.summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if unfinished:
        reason = f"out of time in {unfinished[0]}"
        part.summary = ", ".join(filter(None, [part.summary, reason]))
        part.leave_unfinished()
    return every
