"""The check of a machine's GPUs: its parts, its report, and the program in a rehearsal."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchlib.case_log import CaseLog, read_results
from benchlib.gpu_check.__main__ import make_out, out_folder, read_budget, select_parts
from benchlib.gpu_check.check import PARTS, batches_of, rehearsal_notes, run_check
from benchlib.gpu_check.demo_part import PROMPTS, Run, judge_answers, read_answers
from benchlib.gpu_check.facts import Facts
from benchlib.gpu_check.jobs import Budget, JobResult
from benchlib.gpu_check.kernel_parts import DECODE_FIRST
from benchlib.gpu_check.parts import Part, Setup, judge_cases
from benchlib.gpu_check.pytest_parts import GPU_TESTS
from benchlib.gpu_check.ranks_part import RANKS
from benchlib.gpu_check.report import CheckReport, PartResult
from dsv3.errors import ConfigError
from tests.fake_job import fake

ROOT = Path(__file__).resolve().parents[2]
PARTS_BY_NAME = {part.name: part for part in PARTS}
FACTS = Facts(
    python="3.12.1",
    torch="2.11.0",
    cuda="13.0",
    triton="3.6.0",
    driver="580.1",
    gpus=("H200", "H200"),
    capability="9.0",
    memory_gib=139.8,
    free_gib=139.0,
    missing=(),
    compiler="cc",
    cores=8,
)


def make_setup(out: Path, **more: Any) -> Setup:
    for name in ("logs", "rows"):
        (out / name).mkdir()
    return replace(Setup(root=ROOT, out=out, python=sys.executable, facts=FACTS), **more)


def answers(**changed: str) -> dict[str, str]:
    return {str(i): f"answer {i}" for i in range(len(PROMPTS))} | changed


def test_answers_are_compared_with_the_cpu(tmp_path: Path) -> None:
    runs = [Run(f"cpu {dtype}", "cpu", dtype) for dtype in ("float32", "fp8")]
    runs += [Run("float32", "cuda", "float32"), Run("fp8", "cuda", "fp8")]
    right = {run.name: answers() for run in runs}
    part = PartResult("demo")
    judge_answers(runs, right | {"fp8": answers(**{"1": "other"})}, part)
    assert (part.status, part.summary) == ("passed", "15 of 16 answers of 2 runs are the CPU's")
    part = PartResult("demo")
    judge_answers(runs, right | {"float32": answers(**{"1": "other"})}, part)
    assert part.status == "failed" and "float32: 1 of 8 answers differ from cpu" in part.problems[0]
    assert "'other', not 'answer 1'" in part.problems[0]
    part = PartResult("demo")
    judge_answers(runs, right | {"fp8": {}}, part)
    assert "fp8: 8 of 8 answers differ from cpu fp8" in part.problems[0]
    rows = tmp_path / "out.jsonl"
    body = {"choices": [{"message": {"content": "yes"}}]}
    lines = [{"custom_id": "0", "response": {"body": body}}, {"custom_id": "1", "response": None}]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_answers(rows) == {"0": "yes"} and read_answers(tmp_path / "none") == {}


def test_lists_of_parts_are_whole() -> None:
    from benchlib.kernel_cases import cases

    ops = [case.op for case in cases(small=True)]
    assert set(DECODE_FIRST) == set(ops) and len(set(DECODE_FIRST)) == len(DECODE_FIRST)
    places = [ROOT / path for path in GPU_TESTS]
    for file in (ROOT / "tests").rglob("test_*.py"):
        if re.search(r"pytest\.mark\.gpu\b", file.read_text()) and file != Path(__file__):
            assert any(file == place or place in file.parents for place in places), file
    assert all(part.unproven for part in PARTS)
    assert len(rehearsal_notes(PARTS)) == 1 + len(PARTS)


def test_parts_that_measure_run_alone() -> None:
    batches = [[part.name for part in batch] for batch in batches_of(PARTS)]
    assert batches[:3] == [["smoke"], ["tests", "check", "demo"], ["ranks"]]
    assert all(len(batch) == 1 for batch in batches[2:])


def test_parts_are_selected() -> None:
    assert [part.name for part in select_parts(["rank", "smoke"])] == ["smoke", "rank"]
    assert {part.name for part in PARTS} - {part.name for part in select_parts([])} == {"sanitize"}
    with pytest.raises(ConfigError, match="there is no part 'smok'; did you mean smoke"):
        select_parts(["smok"])
    with pytest.raises(ConfigError, match="there is no part 'xyz'; there are smoke, tests, "):
        select_parts(["xyz"])
    for text in ("", "9", "-5", "1e3", "all"):
        with pytest.raises(ConfigError, match=r"BUDGET=.* is not a number of 10 seconds or more"):
            read_budget(text)
    assert read_budget("300") == 300.0


def test_results_of_another_check_are_kept(tmp_path: Path) -> None:
    out = out_folder(str(tmp_path / "a" / "b"))
    assert not out.parent.exists(), "nothing has run"
    make_out(out)
    with pytest.raises(ConfigError, match="is not empty; name a new directory"):
        out_folder(str(out))
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(ConfigError, match=f"OUT={wrong}: "):
            make_out(out_folder(str(wrong)))


def test_what_a_machine_can_run(tmp_path: Path) -> None:
    setup = make_setup(tmp_path)
    assert setup.processes == 8 and not RANKS.lacks(setup)
    one = replace(setup, facts=replace(FACTS, gpus=("A10",), capability="8.6", free_gib=20.0))
    assert RANKS.lacks(one) == "needs two GPUs; there is 1" and one.processes == 2
    overlap = PARTS_BY_NAME["overlap"]
    assert overlap.lacks(one) == "needs compute capability 9.0" and not overlap.lacks(setup)
    shares = {part.name: part.make_jobs(setup) for part in PARTS if part.name in ("check", "tests")}
    assert [len(jobs) for jobs in shares.values()] == [8, 8]
    every = [job for part in PARTS for job in part.make_jobs(replace(setup, one_shot=True))]
    assert len({job.name for job in every}) == len(every)
    assert sum("--one-shot" in job.argv for job in every) == 2
    lines = FACTS.lines
    assert "H200, the first of 2, compute capability 9.0, 139.8 GiB" in lines[0]
    assert "driver 580.1" in lines[0] and "torch 2.11.0, CUDA 13.0, triton 3.6.0" in lines[1]


def test_a_fault_of_the_check_costs_its_part(tmp_path: Path) -> None:
    def unreadable(*_: object) -> None:
        raise KeyError("us")

    setup = make_setup(tmp_path)
    report = CheckReport([], {})
    parts = [replace(part_of("crash", True), judge=unreadable), part_of("right", True)]
    assert run_check(setup, parts, Budget(60), report) == 1
    assert [part.status for part in report.parts] == ["failed", "passed"]
    assert report.parts[0].problems[0].endswith("cannot be read: KeyError: 'us'")
    assert "unreadable" in (tmp_path / "logs/crash_judge.log").read_text()


def judge(part: Part, setup: Setup, rows: dict[str, list[dict[str, object]]]) -> PartResult:
    """Return the result of a part whose jobs have written rows of passed cases."""
    jobs = part.make_jobs(setup)
    for job in jobs:
        for row in rows[job.name]:
            CaseLog(job.rows).end(str(row["case"]), figures=row)
    result = PartResult(part.name)
    part.judge(setup, [JobResult(job, code=0) for job in jobs], result)
    return result


def test_times_are_tables(tmp_path: Path) -> None:
    """The rows are those that the programs write on a GPU."""
    setup = make_setup(tmp_path)
    table = [{"kernel": "_mla_decode", "launches": 4, "us each": 6.0, "us": 24.0, "share %": 100.0}]
    step = {"case": "decode 8 at 1024", "launch us": 9.0, "experts hit": 7.2, "kernel table": table}
    step |= {"kernels": 84, "busy ms": 0.7, "gaps ms": 0.1}
    rows = {"rank_4_layers": [step | {"ms": 0.8}], "rank_1_layers": [step | {"ms": 0.2}]}
    result = judge(PARTS_BY_NAME["rank"], setup, rows)
    assert result.tables["steps"][0]["MoE layer us"] == pytest.approx(200)
    assert result.tables["kernels of decode 8 at 1024"] == table
    kernel = {"kernel": "act_quant", "shape": "1 x 7168", "us": 2.0, "GB/s": 7.0, "TFLOP/s": 0.0}
    kernel |= {"case": "act_quant 1 x 7168", "% of roof": "in cache", "peer us": None}
    timed = judge(PARTS_BY_NAME["kernels"], setup, {"kernels": [kernel]})
    rates = {"case": "ceilings", "TB/s": 4.2, "bf16 TFLOP/s": 780.0, "fp8 TFLOP/s": 1450.0}
    smoke = judge(PARTS_BY_NAME["smoke"], setup, {"smoke": [{"case": "kernels"}, rates]})
    text = "\n".join(CheckReport([], {}, parts=[result, timed, smoke]).lines())
    assert re.search(r"decode 8 at 1024 +200 +0\.8 +0\.2 +7\.2 +84 +0\.7 +0\.1 +9", text)
    assert re.search(r"act_quant +1 x 7168 +2 +7 +0 +in cache", text)
    assert re.search(r"TB/s +bf16 TFLOP/s +fp8 TFLOP/s\n +4\.2 +780 +", text)
    poor = replace(setup, facts=replace(FACTS, missing=("jinja2",), compiler=""))
    (tmp_path / "rows/smoke.jsonl").unlink()
    smoke = judge(PARTS_BY_NAME["smoke"], poor, {"smoke": [rates]})
    assert smoke.problems[0] == "not installed: jinja2" and "C compiler" in smoke.problems[1]


def test_without_pytest_the_check_is_incomplete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = PARTS_BY_NAME["tests"]
    assert tests.needs == PARTS_BY_NAME["sanitize"].needs == ("pytest", "hypothesis")
    setup = make_setup(tmp_path)
    report = CheckReport([], {})
    parts = [replace(tests, needs=("pytest", "no_such_package")), part_of("right", False)]
    assert run_check(setup, parts, Budget(60), report) == 1
    line = "tests: incomplete: not installed: no_such_package (pip install no_such_package)"
    assert line in capsys.readouterr().out
    assert [part.status for part in report.parts] == ["incomplete", "passed"]


def part_of(end: str, is_timed: bool) -> Part:
    def judge(_: Setup, results: Sequence[JobResult], part: PartResult) -> None:
        judge_cases(results, part)
        part.tables["times"] = [{"kernel": "gemm", "us": 12.5}]

    return Part(
        name=end,
        about="",
        limit=30,
        typical=1,
        make_jobs=lambda setup: [fake(setup.out, end)],
        judge=judge,
        is_timed=is_timed,
        unproven="nothing",
    )


def test_results_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = make_setup(tmp_path)
    report = CheckReport(["GPU: H200"], {"commit": "abc"})
    lacking = replace(part_of("crash", True), name="lacking", lacks=lambda _: "needs two GPUs")
    parts = [part_of("right", False), part_of("spoil", False), lacking]
    assert run_check(setup, parts, Budget(60), report) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "summary.txt").read_text() in printed
    for expected in (
        r"right +passed +\d+ +3 passed",
        r"spoil +failed +\d+ +2 passed, 1 failed",
        r"lacking +skipped +0 +needs two GPUs",
        r"- spoil: b: RuntimeError: CUDA error: misaligned address",
        r"right: times\nkernel +us\ngemm +12\.5",
    ):
        assert re.search(expected, printed), expected
    result = json.loads((tmp_path / "results.json").read_text())
    assert not result["passed"] and [p["status"] for p in result["parts"]][2] == "skipped"
    again = CheckReport([], {}, parts=[PartResult("right"), PartResult("lacking", "skipped")])
    assert again.exit_code == 0
    again.parts.append(PartResult("late", "incomplete"))
    assert again.exit_code == 1


def run_program(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | env
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_wrong_usage_is_one_line(tmp_path: Path) -> None:
    program = str(ROOT / "scripts/gpu_check.sh")
    for arguments, env, expected in (
        (["smok"], {}, "there is no part 'smok'; did you mean smoke?"),
        (["smoke"], {"BUDGET": "soon"}, "BUDGET='soon' is not a number"),
        (["tests", "--tests", "-k 'two"], {}, "--tests=-k 'two: No closing quotation"),
        (["smoke"], {"OUT": str(ROOT)}, "is not empty; name a new directory"),
        (["smoke"], {"CUDA_VISIBLE_DEVICES": ""}, "torch finds no GPU; --rehearse runs every"),
        (["smoke"], {"PYTHON": "/bin/false"}, "is not Python 3.11 or newer"),
    ):
        done = run_program([program, *arguments], tmp_path, **env)
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1 and expected in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    program = str(ROOT / "scripts/gpu_check.sh")
    done = run_program([program, "--rehearse", "smoke", "check", "rank"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, gpu, software, commit, *_ = done.stdout.splitlines()
    out = Path(first.removeprefix("results: "))
    assert out.parent == tmp_path / "gpu_check_results"
    assert gpu.startswith("GPU: ") and "torch " in software and commit.startswith("dsv3: ")
    result = json.loads((out / "results.json").read_text())
    assert [(part["name"], part["status"]) for part in result["parts"]] == [
        ("smoke", "passed"),
        ("check", "passed"),
        ("rank", "passed"),
    ]
    assert "It does not prove that a GPU is right" in done.stdout
    assert len(read_results(out / "rows" / "check_0.jsonl").rows) > 20
    steps = read_results(out / "rows" / "rank_4_layers.jsonl").rows
    assert [row["case"] for row in steps] == [f"decode {b} at 1024" for b in (1, 8, 128)]


@pytest.mark.slow
def test_ctrl_c_leaves_the_results_so_far(tmp_path: Path) -> None:
    program = [str(ROOT / "scripts/gpu_check.sh"), "--rehearse", "smoke", "demo"]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "demo_cpu_float32: done" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130 and not errors
    assert "smoke  passed" in rest and "interrupted" in rest
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert [part["name"] for part in result["parts"]] == ["smoke"] and not result["passed"]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in listed.stdout, "a process goes on"
