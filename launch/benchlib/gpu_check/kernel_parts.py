"""Parts `check` and `kernels`: each kernel against its reference, then its time."""

from collections.abc import Sequence

from benchlib.case_log import PASSED
from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup, judge_cases
from benchlib.gpu_check.report import PartResult

# All kernels; a decode step's come first, because the time may end before the last one.
DECODE_FIRST = (
    *("fp8_gemm", "grouped_gate_up", "grouped_down", "mla_decode", "merge_lse"),
    *("absorb_query", "expand_values", "route_and_permute", "router_logits", "route", "permute"),
    *("unpermute", "add_rmsnorm", "act_quant", "silu_mul_quant", "norm_and_cache", "sum_norm"),
    *("sample", "index_scores", "top_candidates", "select_slots", "index_queries"),
    *("write_index_keys", "experts", "mla_prefill", "bf16_gemm", "rope_and_cache"),
    *("weight_dequant", "int_gemm", "int8_gemm"),
)
_REHEARSED = ("act_quant", "permute")
_COLUMNS = ("kernel", "shape", "us", "GB/s", "TFLOP/s", "% of roof")
_BENCH = ("launch/bench.py", "kernels")


def _check_jobs(setup: Setup) -> list[Job]:
    jobs = []
    for i in range(setup.processes):
        name = f"check_{i}"
        rows = setup.rows_file(name)
        command = [*_BENCH, "--check", "--share", f"{i}/{setup.processes}", "--rows", rows]
        jobs.append(setup.job(name, *command, rows=rows, interpret=setup.rehearse))
    return jobs


def _judge_check(_setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    judge_cases(results, part)


def _kernel_jobs(setup: Setup) -> list[Job]:
    rows = setup.rows_file("kernels")
    flags = ["--ops", *DECODE_FIRST]
    if setup.rehearse:
        flags = ["--check", "--ops", *_REHEARSED]
    command = [*_BENCH, *flags, "--rows", rows]
    return [setup.job("kernels", *command, rows=rows, interpret=setup.rehearse)]


def _judge_kernels(setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    found = judge_cases(results, part)
    timed = [row for case in found for row in case.rows if row["result"] == PASSED]
    if not setup.rehearse:
        part.tables["times"] = [{name: row[name] for name in _COLUMNS} for row in timed]
    if part.status == "incomplete" and timed:  # the most important ones come first
        part.status = "passed"


CHECK = Part(
    name="check",
    about="every Triton kernel at DeepSeek-V3's shapes against its torch reference",
    limit=240,
    typical=120,
    make_jobs=_check_jobs,
    judge=_judge_check,
    unproven="kernels ran at small shapes in Triton's interpreter: no compiled kernel has run",
)
KERNELS = Part(
    name="kernels",
    about="time of each kernel at DeepSeek-V3's shapes and its roofline floor",
    limit=150,
    typical=120,
    make_jobs=_kernel_jobs,
    judge=_judge_kernels,
    is_timed=True,
    unproven="no kernel was timed",
)
