"""The benchmark's cases: kernels are right at small shapes, and wrong ones are found out."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchlib.hardware import hardware
from benchlib.kernel_cases import Case, cases, check, measure
from benchlib.kernel_timing import (
    FP8,
    busy_and_idle,
    copies_needed,
    matrix_peak,
    median_seconds,
    read_bandwidth,
)
from dsv3_kernels._triton import HAS_TRITON

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
HALF = Case(
    "half",
    "2 x 3",
    lambda device: (torch.randn(2, 3, device=device),),
    lambda x: (x * 0.5, [x.to(FP8)]),
    lambda x: (x / 2, [x.to(FP8)]),
    bytes=48,
)


@pytest.mark.parametrize(
    "case", list(cases(small=True)), ids=lambda case: f"{case.op} {case.shape}"
)
def test_kernels_are_right(case: Case) -> None:
    torch.manual_seed(0)
    assert check(case, CPU) == ""


def test_every_operation_is_measured_at_the_models_shapes() -> None:
    large = list(cases())
    assert {case.op for case in large} == {case.op for case in cases(small=True)}
    assert all(case.bytes > 0 for case in large)
    assert len({(case.op, case.shape) for case in large}) == len(large)


def test_wrong_kernels_are_found_out() -> None:
    assert check(HALF, CPU) == ""
    wrong = [
        (lambda x: (x * 0.51, [x.to(FP8)]), "result 0: off by"),
        (lambda x: (x * 0.5, [x.to(FP8) for _ in range(2)]), "3 results, want 2"),
        (lambda x: (x * 0.5, [x]), "result 1 is torch.float32, want torch.float8_e4m3fn"),
        (lambda x: (x * 0.5, [(x * torch.nan).to(FP8)]), "result 1: non-finite"),
    ]
    for kernel, message in wrong:
        assert message in check(replace(HALF, kernel=kernel), CPU)


def test_times(caplog: pytest.LogCaptureFixture) -> None:
    ours, peer = measure(replace(HALF, peer=lambda x: x * 0.5), CPU)
    assert ours > 0 and peer is not None and peer > 0
    assert measure(HALF, CPU)[1] is None
    assert measure(replace(HALF, peer=lambda x: x.view(7)), CPU)[1] is None
    assert "half" in caplog.text and "no peer" in caplog.text
    assert [copies_needed(n) for n in (1, 1e8, 1e10)] == [64, 4, 2]
    assert median_seconds([lambda: time.sleep(0.01)], CPU) >= 0.01 > median_seconds([bool], CPU)
    runs: list[int] = []
    median_seconds([lambda: time.sleep(0.01), lambda: runs.append(1)], CPU, budget=0.02)
    assert len(runs) == 1 + 3, "a warm-up and the least number of timed runs"
    assert read_bandwidth(CPU) > 1e8 and matrix_peak(CPU, torch.float32) > 1e8


def test_ceilings_measure_what_is_asked_for() -> None:
    assert hardware("measure", CPU).fp32 == 0.0 < hardware("measure", CPU, fp32=True).fp32


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(("milliseconds", "in_graph"), [(1.0, 64), (30.0, 2), (500.0, 1)])
def test_long_calls_are_captured_less_often(
    milliseconds: float, in_graph: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels import dry_cuda

    runs: list[int] = []
    monkeypatch.setattr(dry_cuda.Event, "elapsed_time", lambda *_: milliseconds)
    with dry_cuda.dry_gpu(False):
        x = torch.zeros(4, device="cuda")

        def call() -> None:
            runs.append(1)
            x.add_(1)

        device = torch.device("cuda", 0)
        median_seconds([call], device, budget=11 * 0.075)
        assert len(runs) == 2 + in_graph, "a first call, a timed one, and those of the graph"
        runs.clear()
        median_seconds([call], device)
    assert len(runs) == 1 + 64, "ranks that call a collective must agree on the number of calls"


def test_busy_and_idle() -> None:
    assert busy_and_idle([]) == (0.0, 0.0)
    # Two streams overlap, one interval lies in another, then nothing for a while.
    assert busy_and_idle([(5, 7), (0, 2), (1, 3), (5.5, 6)]) == (5.0, 2.0)


def test_without_a_gpu_kernels_are_only_compared() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "launch/bench.py", "kernels"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "there is none; --check compares them anyway" in refused.stderr
    checked = subprocess.run(
        [*command, "--check", "--ops", "merge_lse"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0 and "1 of 1 are right" in checked.stdout, checked.stderr
