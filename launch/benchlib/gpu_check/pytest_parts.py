"""Parts `tests` and `sanitize`: the project's GPU tests, alone or under compute-sanitizer."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchlib.case_log import PASSED, SKIPPED
from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup, judge_cases
from benchlib.gpu_check.report import PartResult

# All tests with the marker `gpu` are here.
GPU_TESTS = ("tests/kernels", "tests/unit/test_side_stream.py", "tests/unit/test_host.py")
_REHEARSED = ("tests/kernels/test_act_quant.py", "tests/kernels/test_permute.py")
_SANITIZED = ("tests/kernels/test_gpu.py",)
_PLUGIN = "benchlib.gpu_check.pytest_plugin"
_NEEDS = ("pytest", "hypothesis")
_SANITIZER = Path("/usr/local/cuda/bin/compute-sanitizer")


def pytest_job(
    setup: Setup,
    name: str,
    tests: Sequence[str],
    marker: str,
    share: str = "0/1",
    prefix: Sequence[str] = (),
) -> Job:
    """Return a job that runs a share of tests.

    Args:
        setup: the check.
        name: names its files.
        tests: files and other arguments of pytest.
        marker: selects tests.
        share: I/N.
        prefix: a command that runs pytest.
    """
    rows = setup.rows_file(name)
    options = ["-p", _PLUGIN, "-p", "no:cacheprovider", "-q", "--tb=short", "-m", marker]
    options += ["--case-log", str(rows), "--share", share, "-o", "faulthandler_timeout=90"]
    argv = [*prefix, setup.python, "-m", "pytest", *options, *tests]
    env = {"TRITON_INTERPRET": str(int(setup.rehearse)), "OMP_NUM_THREADS": "1"}
    return setup.command(name, *argv, rows=rows, env=env)


def _test_jobs(setup: Setup) -> list[Job]:
    if setup.rehearse:
        return [pytest_job(setup, "tests", setup.tests or _REHEARSED, "not gpu and not slow")]
    tests = setup.tests or GPU_TESTS
    count = setup.processes
    marker = "gpu and not multi_gpu"  # several GPUs are the part `ranks`
    return [pytest_job(setup, f"tests_{i}", tests, marker, f"{i}/{count}") for i in range(count)]


def _sanitizer() -> str:
    """Return the path of compute-sanitizer; empty if it is not installed."""
    return shutil.which("compute-sanitizer") or (str(_SANITIZER) if _SANITIZER.exists() else "")


def _lacks_sanitizer(setup: Setup) -> str:
    if not setup.rehearse and not _sanitizer():
        return "compute-sanitizer is not installed (it is part of the CUDA toolkit)"
    return ""


def _sanitize_jobs(setup: Setup) -> list[Job]:
    if setup.rehearse:
        return [pytest_job(setup, "sanitize", _REHEARSED[:1], "not gpu and not slow")]
    tool = [_sanitizer(), "--tool", "memcheck", "--target-processes", "all", "--error-exitcode"]
    tool += ["99", "--print-limit", "20"]
    tests = setup.tests or _SANITIZED
    return [pytest_job(setup, "sanitize", tests, "gpu and not multi_gpu", prefix=tool)]


def _judge(_setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    """Judge tests; if all were skipped, nothing has been shown."""
    found = judge_cases(results, part)
    outcomes = {row["result"] for cases in found for row in cases.rows}
    if SKIPPED in outcomes and PASSED not in outcomes and part.status == "passed":
        part.fail("all tests were skipped; the reasons are in the rows")


TESTS = Part(
    name="tests",
    about="the project's tests that need a GPU, in several processes",
    limit=240,
    typical=120,
    make_jobs=_test_jobs,
    judge=_judge,
    unproven="tests of two kernels ran in Triton's interpreter, none that needs a GPU",
    needs=_NEEDS,
)
SANITIZE = Part(
    name="sanitize",
    about="tests under compute-sanitizer; only by name, --tests chooses them",
    limit=400,
    typical=300,
    make_jobs=_sanitize_jobs,
    judge=_judge,
    is_timed=True,
    by_default=False,
    unproven="tests ran without compute-sanitizer",
    lacks=_lacks_sanitizer,
    needs=_NEEDS,
)
