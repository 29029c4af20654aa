"""Part `ranks`: sums and answers of the demo model on several GPUs."""

from collections.abc import Sequence

from benchlib.gpu_check.demo_part import Run, demo_jobs, judge_runs, references, torchrun
from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup, judge_cases
from benchlib.gpu_check.pytest_parts import pytest_job
from benchlib.gpu_check.report import PartResult

_DTYPES = ("float32", "fp8")
_MOST_RANKS = 8
_ONE_SHOT_TESTS = ("tests/kernels/test_gpu_sums.py",)


def ranks_runs(setup: Setup) -> list[Run]:
    """Return the runs of the part `ranks`."""
    device = "cpu" if setup.rehearse else "cuda"
    runs = [Run(f"{dtype}, ranks", device, dtype, (), _num_ranks(setup)) for dtype in _DTYPES]
    if setup.one_shot and not setup.rehearse:
        runs.append(Run("float32, one-shot", device, "float32", ("--one-shot",), _num_ranks(setup)))
    return [*references(runs), *runs]


def _num_ranks(setup: Setup) -> int:
    """Return the largest power of two up to the number of GPUs, as the demo model needs."""
    count = 2
    while not setup.rehearse and 2 * count <= min(len(setup.facts.gpus), _MOST_RANKS):
        count *= 2
    return count


def _ranks_jobs(setup: Setup) -> list[Job]:
    ranks = _num_ranks(setup)
    jobs = []
    kinds = [("sums", False), ("sums_one_shot", True)] if setup.one_shot else [("sums", False)]
    for name, one_shot in kinds:
        rows = setup.rows_file(name)
        argv = [*torchrun(ranks), "-m", "benchlib.gpu_check.sums", "--rows", rows]
        argv += ["--device", "cpu" if setup.rehearse else "cuda"]
        argv += ["--one-shot"] if one_shot else []
        jobs.append(setup.job(name, *argv, rows=rows))
    if setup.one_shot and not setup.rehearse:
        jobs.append(pytest_job(setup, "tests_one_shot", _ONE_SHOT_TESTS, "multi_gpu"))
    return jobs + demo_jobs(setup, "ranks", ranks_runs(setup))


def _judge_ranks(setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    with_rows = [result for result in results if result.job.rows is not None]
    sums = judge_cases(with_rows, part)
    counts = part.summary
    if not setup.rehearse:
        figures = ("exchange", "us", "GB/s")
        rows = [row for cases in sums for row in cases.rows]
        part.tables["times"] = [{k: row[k] for k in figures} for row in rows if "us" in row]
    runs = results[len(with_rows) :]
    part.summary = ""
    judge_runs(setup, ranks_runs(setup), runs, part)
    part.summary = f"sums: {counts}; {part.summary}"


RANKS = Part(
    name="ranks",
    about="on two GPUs or more: sums over NCCL and the demo model; --one-shot adds shared memory",
    limit=180,
    typical=60,
    make_jobs=_ranks_jobs,
    judge=_judge_ranks,
    is_timed=True,
    unproven="two ranks ran on the CPU over Gloo: no NCCL, no memory that GPUs share",
    lacks=lambda setup: (
        ""
        if setup.rehearse or len(setup.facts.gpus) > 1
        else f"needs two GPUs; there is {len(setup.facts.gpus)}"
    ),
)
