"""`bench.py kernels`: a case that raises costs its row, and rows are written as they are made."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from benchlib.case_log import CaseLog, describe, read_results, spoils_device
from benchlib.flags import share
from benchlib.hardware import HARDWARE
from benchlib.kernel_cases import Case
from benchlib.kernels import measure_cases, select_cases
from benchlib.report import Report
from dsv3.errors import ConfigError

CPU = torch.device("cpu")
HALF = Case(
    "half",
    "right",
    lambda device: (torch.randn(2, 3, device=device),),
    lambda x: x * 0.5,
    lambda x: x / 2,
    bytes=48,
)


class CompilationError(Exception):
    """As Triton's: derived from Exception only."""


def raising(error: Exception) -> Callable[..., Any]:
    def kernel(*_: object) -> torch.Tensor:
        raise error

    return kernel


WRONG = replace(HALF, shape="wrong", kernel=lambda x: x * 0.6)
UNCOMPILED = replace(
    HALF, shape="uncompiled", kernel=raising(CompilationError("at 3:4:\ntl.dot(a)"))
)
NO_OPERANDS = replace(HALF, shape="no memory", make=raising(torch.OutOfMemoryError("CUDA out of")))
SPOILED = replace(
    HALF, shape="spoiled", kernel=raising(RuntimeError("CUDA error: an illegal memory access"))
)


def run(cases: list[Case], path: Path | None, timed: bool = True) -> Report:
    report = Report("kernels")
    ceilings = HARDWARE["h100"] if timed else None
    measure_cases(cases, CPU, ceilings, CaseLog(path, "--rows"), report)
    return report


def test_each_case_that_raises_costs_its_row(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    report = run([WRONG, UNCOMPILED, NO_OPERANDS, HALF], rows)
    checks = {row["shape"]: row["check"] for row in report.rows}
    assert checks["wrong"].startswith("result 0: off by")
    assert checks["uncompiled"] == "CompilationError: at 3:4: tl.dot(a)"
    assert checks["no memory"] == "OutOfMemoryError: CUDA out of"
    assert checks["right"] == "right"
    timed = [row["shape"] for row in report.rows if row["us"] is not None]
    assert timed == ["right"], "figures of a wrong kernel"
    assert len({tuple(row) for row in report.rows}) == 1, "a table needs the same columns"
    assert report.notes == ["1 of 4 are right"]
    results = read_results(rows)
    assert [row["result"] for row in results.rows] == ["failed"] * 3 + ["passed"]
    assert results.rows[3]["us"] > 0 and not results.unended


def test_a_failed_measurement_is_not_right() -> None:
    calls: list[int] = []

    def second_time(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise CompilationError("out of resources: shared memory")
        return x * 0.5

    row = run([replace(HALF, kernel=second_time)], None).rows[0]
    assert row["check"] == "CompilationError: out of resources: shared memory" and not row["us"]


def test_a_spoiled_context_ends_the_run_with_the_rows_so_far(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    report = run([HALF, SPOILED, WRONG, UNCOMPILED], rows)
    assert [row["shape"] for row in report.rows] == ["right", "spoiled"]
    assert report.notes[0] == "1 of 2 are right"
    assert "stopped at half spoiled" in report.notes[1] and "2 cases were not" in report.notes[1]
    assert read_results(rows).has_spoiled_device
    again = run([HALF, SPOILED, WRONG, UNCOMPILED], rows)
    assert [row["shape"] for row in again.rows] == ["wrong", "uncompiled"]
    assert again.notes[1] == "2 cases are in --rows and were not run"


def test_a_case_that_ends_the_process_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    killed = replace(HALF, shape="killed", kernel=raising(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run([HALF, killed, WRONG], rows)
    results = read_results(rows)
    assert results.unended == ["half killed"] and len(results.rows) == 1
    with rows.open("a") as file:
        file.write('{"case": "half wr')  # a line that was cut
    assert len(read_results(rows).rows) == 1
    assert [row["shape"] for row in run([HALF, killed, WRONG], rows).rows] == ["wrong"]


def test_errors_that_spoil_a_context() -> None:
    for text in ("CUDA error: unspecified", "Triton Error [CUDA]: an illegal memory access was"):
        assert spoils_device(text)
    for text in ("CUDA out of memory. Tried to allocate 2 GiB", "result 0: off by 3", ""):
        assert not spoils_device(text)
    assert describe(ValueError("a\nb")) == "ValueError: a b"
    assert describe(AssertionError("off by 3")) == "off by 3"
    assert describe(AssertionError()) == "AssertionError:"


def test_cases_are_selected() -> None:
    chosen = select_cases(["permute", "act_quant", "permute"], small=False)
    assert list(dict.fromkeys(case.op for case in chosen)) == ["permute", "act_quant"]
    shares = [share(f"{i}/3").of(chosen) for i in range(3)]
    shared = [id(case) for part in shares for case in part]
    assert sorted(shared) == sorted(map(id, chosen))
    with pytest.raises(ConfigError, match="--ops=act_qant: no such kernel; did you mean act_quant"):
        select_cases(["act_qant"], small=True)
    with pytest.raises(ConfigError, match="--ops=zzz: no such kernel; there are absorb_query"):
        select_cases(["zzz"], small=True)


def test_rows_of_another_program_are_not_continued(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"--rows=.*another file is there, not rows of cases"):
        CaseLog(notes, "--rows")
    assert notes.read_text() == "mine\n"
    written = tmp_path / "rows.jsonl"
    CaseLog(written).skip("a", "no GPU")
    assert json.loads(written.read_text()) == {"case": "a", "result": "skipped", "why": "no GPU"}


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "1/0"])
def test_no_share(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--share: .*is not I/N|expected one argument"):
        bench.main(["kernels", "--share", text])
