"""Part `smoke`: missing packages, two kernels, a CUDA graph, the ceilings."""

from collections.abc import Sequence

from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup, judge_cases
from benchlib.gpu_check.report import PartResult


def _jobs(setup: Setup) -> list[Job]:
    rows = setup.rows_file("smoke")
    module = ("-m", "benchlib.gpu_check.smoke")
    return [setup.job("smoke", *module, rows, rows=rows, interpret=setup.rehearse)]


def _judge(setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    found = judge_cases(results, part)
    part.tables["ceilings"] = [
        {k: row[k] for k in ("TB/s", "bf16 TFLOP/s", "fp8 TFLOP/s")}
        for cases in found
        for row in cases.rows
        if "TB/s" in row
    ]
    facts = setup.facts
    if facts.missing:
        part.fail(f"not installed: {', '.join(facts.missing)}")
    if facts.gpus and not facts.compiler:
        part.fail("there is no C compiler (cc, gcc or clang); Triton needs one for its launchers")


SMOKE = Part(
    name="smoke",
    about="packages, two kernels, replays of a CUDA graph, ceilings of memory and matrix units",
    limit=120,
    typical=25,
    make_jobs=_jobs,
    judge=_judge,
    is_timed=True,
    unproven="two kernels ran in Triton's interpreter; no CUDA graph, no ceilings",
)
