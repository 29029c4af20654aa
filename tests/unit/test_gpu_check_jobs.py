"""Jobs of the check of GPUs: a hang, a crash or a spoiled context costs one case."""

import sys
from pathlib import Path

import pytest

from benchlib.case_log import read_results
from benchlib.gpu_check.jobs import Budget, Job, describe_exit, run_jobs
from benchlib.gpu_check.parts import judge_cases
from benchlib.gpu_check.report import PartResult
from tests.fake_job import fake

ROOT = Path(__file__).resolve().parents[2]


def test_a_bad_case_costs_itself(tmp_path: Path) -> None:
    jobs = [fake(tmp_path, end) for end in ("right", "crash", "spoil")]
    jobs.insert(1, fake(tmp_path, "hang", silence=5.0))
    results = run_jobs(jobs, 60, at_once=4)
    assert [result.job.name for result in results] == ["right", "hang", "crash", "spoil"]
    assert [result.code for result in results] == [0] * 4, "others went on with the last case"
    found = [read_results(job.rows) for job in jobs if job.rows]
    reasons = [[row["why"] for row in cases.failed] for cases in found]
    assert reasons == [
        [],
        ["hung: no output for 5 s"],
        ["ended by SIGABRT: error: no such device"],
        ["RuntimeError: CUDA error: misaligned address"],
    ]
    outcomes = [{row["case"]: row["result"] for row in cases.rows} for cases in found]
    assert all(cases["a"] == cases["c"] == "passed" for cases in outcomes)
    part = PartResult("check")
    judge_cases(results, part)
    assert part.status == "failed" and part.summary == "9 passed, 3 failed"
    assert part.problems[0] == "b: hung: no output for 5 s"


def test_a_job_that_fails_before_its_first_case_is_not_repeated(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    argv = (sys.executable, "-c", "raise SystemExit('error: no module named triton')")
    job = Job("broken", argv, log=tmp_path / "log", cwd=tmp_path, rows=rows)
    [result] = run_jobs([job], 30, 1)
    assert (tmp_path / "log").read_text().count("$ ") == 1
    part = PartResult("check")
    judge_cases([result], part)
    assert part.problems == ["broken: exit code 1: error: no module named triton"]


def test_a_device_that_never_recovers_is_given_up(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    code = "import json, os, sys; file = open(sys.argv[1], 'a');"
    code += "print(json.dumps({'begin': str(os.getpid())}), file=file, flush=True); os.abort()"
    argv = (sys.executable, "-c", code, str(rows))
    [result] = run_jobs([Job("dead", argv, tmp_path / "log", tmp_path, rows, tries=3)], 30, 1)
    assert result.fault.startswith("given up after 3 processes")
    assert len(read_results(rows).failed) == 3


def test_the_time_ends_jobs_and_starts_no_more(tmp_path: Path) -> None:
    jobs = [fake(tmp_path, "hang"), fake(tmp_path, "right")]
    hanging, waiting = run_jobs(jobs, 8.0, at_once=1)
    assert hanging.seconds < 50, "it was ended"
    assert hanging.out_of_time and hanging.fault == "out of time: waiting"
    assert waiting.out_of_time and waiting.fault == "not started: out of time"
    part = PartResult("check")
    judge_cases([hanging, waiting], part)
    assert (part.status, part.summary) == ("incomplete", "1 passed, out of time in b")
    assert Budget(100).left > 90 and Budget(8).left > 5 and Budget(8).spent < 1


def test_ends_in_words() -> None:
    assert [describe_exit(code) for code in (None, 2, -11, -99)] == [
        "not started",
        "exit code 2",
        "ended by SIGSEGV",
        "ended by signal 99",
    ]


TESTS = """
import os, pytest

def test_right():
    pass

def test_wrong():
    assert 1 == 2

def test_spoiled():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.fixture
def broken():
    raise ValueError("no device")

def test_broken(broken):
    pass

def test_skipped():
    pytest.skip("needs a GPU")

def test_crash():
    os.abort()

def test_last():
    pass
"""


@pytest.mark.slow
def test_tests_write_their_results(tmp_path: Path) -> None:
    """Each test costs itself at most; two shares have all tests between them."""
    (tmp_path / "test_some.py").write_text(TESTS)
    jobs = []
    for i in range(2):
        rows = tmp_path / f"{i}.jsonl"
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "benchlib.gpu_check.pytest_plugin"]
        argv += ["-p", "no:cacheprovider", "--case-log", str(rows), "--share", f"{i}/2"]
        argv += ["test_some.py"]
        env = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels:{ROOT}/launch"}
        jobs.append(Job(str(i), tuple(argv), tmp_path / f"{i}.log", tmp_path, rows, env))
    part = PartResult("tests")
    found = judge_cases(run_jobs(jobs, 120, at_once=2), part)
    results = {
        row["case"].split("::")[1]: (row["result"], row.get("why", ""))
        for cases in found
        for row in cases.rows
    }
    assert results["test_right"] == results["test_last"] == ("passed", "")
    assert results["test_skipped"] == ("skipped", "Skipped: needs a GPU")
    for name, why in (
        ("wrong", "assert 1 == 2"),
        ("spoiled", "CUDA error: an illegal memory access"),
        ("broken", "no device"),
        ("crash", "ended by SIGABRT"),
    ):
        result, reason = results[f"test_{name}"]
        assert result == "failed" and why in reason, name
    assert part.summary == "2 passed, 4 failed, 1 skipped" and len(part.problems) == 4
