"""Runs the parts of a check in order, within a budget of seconds, and reports them."""

import time
import traceback
from collections.abc import Sequence

from benchlib.case_log import describe
from benchlib.gpu_check.cli_part import CLI
from benchlib.gpu_check.demo_part import DEMO
from benchlib.gpu_check.jobs import Budget, JobResult, run_jobs
from benchlib.gpu_check.kernel_parts import CHECK, KERNELS
from benchlib.gpu_check.parts import Part, Setup
from benchlib.gpu_check.pytest_parts import SANITIZE, TESTS
from benchlib.gpu_check.rank_parts import OVERLAP, RANK, SHARD
from benchlib.gpu_check.ranks_part import RANKS
from benchlib.gpu_check.report import CheckReport, PartResult
from benchlib.gpu_check.smoke_part import SMOKE

# In the order of the check: results first, then times.
PARTS = (SMOKE, TESTS, CHECK, DEMO, RANKS, RANK, KERNELS, CLI, OVERLAP, SHARD, SANITIZE)

_REHEARSAL_FACTOR = 2.5  # CPUs are slower than a GPU, and one job runs at a time


def run_check(setup: Setup, parts: Sequence[Part], budget: Budget, report: CheckReport) -> int:
    """Run the parts, print and write the report; return the exit code."""
    report.notes = rehearsal_notes(parts) if setup.rehearse else []
    try:
        for batch in batches_of(parts):
            report.parts += run_parts(setup, batch, budget)
    except KeyboardInterrupt:
        report.was_interrupted = True
        report.notes.append("interrupted: the parts that are not in the table have no result")
        raise
    finally:
        spent = f"{budget.spent:.0f} of {budget.seconds:.0f} s; results are in {setup.out}"
        report.notes.append(spent)
        print("\n".join(["", *report.lines()]), flush=True)
        report.write(setup.out)
    return report.exit_code


def batches_of(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in batches: timed ones alone, neighbouring others side by side."""
    batches: list[list[Part]] = []
    for part in parts:
        if batches and not part.is_timed and not batches[-1][0].is_timed:
            batches[-1].append(part)
        else:
            batches.append([part])
    return batches


def rehearsal_notes(parts: Sequence[Part]) -> list[str]:
    """Return a line for each part about the gaps of its rehearsal."""
    lines = [f"- {part.name}: {part.unproven}" for part in parts if part.unproven]
    return ["This was a rehearsal without a GPU. It does not prove that a GPU is right:", *lines]


def run_parts(setup: Setup, parts: Sequence[Part], budget: Budget) -> list[PartResult]:
    """Run parts side by side; return their results."""
    results = {part.name: PartResult(part.name) for part in parts}
    able = []
    for part in parts:
        result = results[part.name]
        if reason := part.lacks(setup):
            result.status = "skipped"
        elif reason := part.missing():
            result.leave_unfinished()
        else:
            able.append(part)
            continue
        result.summary = reason
        _say(budget, f"{part.name}: {result.status}: {reason}")
    if able:
        _run_able(setup, able, budget, results)
    return list(results.values())


def _run_able(
    setup: Setup, parts: Sequence[Part], budget: Budget, results: dict[str, PartResult]
) -> None:
    begin = time.monotonic()
    jobs_by_part = {part.name: part.make_jobs(setup) for part in parts}
    jobs = [job for part in parts for job in jobs_by_part[part.name]]
    counts = (f"{name} ({len(part_jobs)})" for name, part_jobs in jobs_by_part.items())
    limit = max(part.limit for part in parts)
    if setup.rehearse:
        limit *= _REHEARSAL_FACTOR
    limit = min(limit, max(0.0, budget.left))
    _say(budget, f"{', '.join(counts)}: at most {limit:.0f} s")

    def on_end(result: JobResult) -> None:
        fault = result.fault.split("\n")[0][:200]
        _say(budget, f"  {result.job.name}: {fault or 'done'}, {result.seconds:.0f} s")

    at_once = 1 if parts[0].is_timed else setup.processes
    ends = run_jobs(jobs, limit, at_once, on_end)
    by_name = {end.job.name: end for end in ends}
    for part in parts:
        result = results[part.name]
        part_ends = [by_name[job.name] for job in jobs_by_part[part.name]]
        try:
            part.judge(setup, part_ends, result)
        except Exception as error:  # a fault of the check must not cost the other parts
            log = setup.out / "logs" / f"{part.name}_judge.log"
            log.write_text(traceback.format_exc())
            result.fail(f"its results in rows/ and logs/ cannot be read: {describe(error)}")
        result.seconds = time.monotonic() - begin
        _say(budget, f"{part.name}: {result.status}: {result.summary}")


def _say(budget: Budget, text: str) -> None:
    print(f"[{budget.spent:4.0f} s] {text}", flush=True)
