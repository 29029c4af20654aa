"""Parts `rank`, `overlap` and `shard`: decode steps of one rank of DeepSeek-V3, as served."""

from collections.abc import Sequence
from functools import partial

from benchlib.case_log import PASSED
from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup, judge_cases
from benchlib.gpu_check.report import PartResult
from benchlib.table import Row

# The time of a MoE layer is the difference of these two, whose first layer is dense.
_LAYERS = 4
_DENSE = 1
_DRY_RUN = "tests/kernels/dry_run.py"
_SILENCE = 180.0  # the first step compiles its kernels
_UNPROVEN = "steps went to a GPU that does not exist: no kernel ran and no time is real"


def _jobs(name: str, flags: Sequence[str], setup: Setup) -> list[Job]:
    jobs = []
    for layers in (_LAYERS, _DENSE):
        title = f"{name}_{layers}_layers"
        rows = setup.rows_file(title)
        argv = ["launch/bench.py", "rank", "--config", "v3-671b", "--world", "8"]
        argv += ["--layers", str(layers), "--context", "1024", *flags]
        if setup.rehearse:
            argv = [_DRY_RUN, *argv, "--steps", "1", "--hardware", "h100"]
        jobs.append(setup.job(title, *argv, "--rows", rows, rows=rows, silence=_SILENCE))
    return jobs


def _judge(setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    whole, dense = judge_cases(results, part)
    if setup.rehearse:
        return
    dense_ms = {row["case"]: row["ms"] for row in dense.rows if row["result"] == PASSED}
    steps = [row for row in whole.rows if row["result"] == PASSED]
    part.tables["steps"] = [_step_row(row, dense_ms.get(row["case"])) for row in steps]
    part.tables |= {f"kernels of {row['case']}": row["kernel table"] for row in steps}


def _step_row(row: Row, dense_ms: float | None) -> Row:
    """Return the table's row of a step, with the time of a MoE layer if that is known."""
    moe_us = None
    if dense_ms is not None:
        moe_us = 1e3 * (row["ms"] - dense_ms) / (_LAYERS - _DENSE)
    return {
        "step": row["case"],
        "MoE layer us": moe_us,
        f"ms, {_LAYERS} layers": row["ms"],
        f"ms, {_DENSE} layer": dense_ms,
        "experts hit": row["experts hit"],
        **{name: row.get(name) for name in ("kernels", "busy ms", "gaps ms")},
        "launch us": row["launch us"],
    }


RANK = Part(
    name="rank",
    about="decode steps of one rank of eight of DeepSeek-V3: time of a step and of a MoE layer",
    limit=110,
    typical=70,
    make_jobs=partial(_jobs, "rank", ("--batch", "1", "8", "128")),
    judge=_judge,
    is_timed=True,
    unproven=_UNPROVEN,
)
OVERLAP = Part(
    name="overlap",
    about="the same with launches that overlap (--overlap-launches, Hopper)",
    limit=70,
    typical=40,
    make_jobs=partial(_jobs, "overlap", ("--batch", "1", "8", "--overlap-launches")),
    judge=_judge,
    is_timed=True,
    unproven=_UNPROVEN,
    lacks=lambda setup: (
        "" if setup.rehearse or setup.facts.has_overlap else "needs compute capability 9.0"
    ),
)
SHARD = Part(
    name="shard",
    about="the same with the cache split over the ranks (--kv-shard tokens)",
    limit=70,
    typical=40,
    make_jobs=partial(_jobs, "shard", ("--batch", "1", "8", "--kv-shard", "tokens")),
    judge=_judge,
    is_timed=True,
    unproven=_UNPROVEN,
)
