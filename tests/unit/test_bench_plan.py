"""The cost model: memory and time of every layout, predicted and measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bench
from benchlib import balance, layouts, plan_measured
from benchlib.hardware import HARDWARE, read_hardware
from benchlib.plan import rank_layouts
from benchlib.roofline import RooflineSetup
from benchlib.step_shape import StepKind, StepShape
from dsv3.config import ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.errors import ConfigError
from tests import programs
from tests.forked import run_forked

V3 = RooflineSetup(config=load_model_config("v3-671b"), layout=ParallelConfig())
H200 = HARDWARE["h200"]


def test_every_layout_once() -> None:
    found = [(x.setup.layout.tp, x.setup.kv_shard, x.dispatch) for x in layouts.layouts(V3, 4)]
    assert found == [
        (1, "none", "alltoall"),
        (1, "none", "allreduce"),
        (2, "tokens", "alltoall"),
        (2, "tokens", "allreduce"),
        (2, "none", "alltoall"),
        (2, "none", "allreduce"),
        (4, "tokens", "allreduce"),
        (4, "none", "allreduce"),
    ]
    assert [x.flags() for x in layouts.layouts(V3, 1)] == ["--tp 1 --dp 1 --kv-shard none"]
    assert next(layouts.layouts(V3, 2)).flags().endswith("--moe-dispatch alltoall")
    assert list(layouts.layouts(V3, 3)) == []


@pytest.mark.slow
def test_memory() -> None:
    eight = ParallelConfig(world_size=8)
    dealt, repeated = (replace(V3, layout=eight, kv_shard=kind) for kind in ("tokens", "none"))
    weights, tokens = layouts.memory(dealt, H200)
    assert 79 < weights / 2**30 < 86
    assert tokens == pytest.approx(8 * layouts.memory(repeated, H200)[1], rel=0.01)
    assert weights + tokens / 8 * 61 * 1152 < H200.memory
    assert layouts.memory(dealt, HARDWARE["h100"]) == (weights, 0)
    groups = replace(V3, layout=ParallelConfig(world_size=8, tp=1, dp=8))
    assert layouts.memory(groups, H200)[0] > weights


def test_time() -> None:
    place = ParallelConfig(world_size=8, tp=1, dp=8)
    sent, gathered = (
        layouts.Layout(replace(V3, layout=place), kind) for kind in ("alltoall", "allreduce")
    )
    prompt, decode = StepShape(prefill=1024), StepShape(decode=16, context=1000)
    # A token needs 4 groups at most, so sending it there costs less than telling all of them.
    wire = [
        sum(op.wire * op.count for op in layout.ops(prompt) if op.name == "moe.combine")
        for layout in (sent, gathered)
    ]
    assert wire[0] < 0.7 * wire[1]
    assert wire[1] == 58 * 7 * 1024 * 7168 * 2
    assert sent.seconds(prompt, H200) < gathered.seconds(prompt, H200)
    count = sum(op.count for op in sent.ops(decode))
    slow = replace(H200, launch=H200.launch + 1e-3)
    difference = sent.seconds(decode, slow) - sent.seconds(decode, H200)
    assert difference == pytest.approx(1e-3 * count)


def test_hardware(tmp_path: Path) -> None:
    hardware, ranks = read_hardware("h800x16", {"read": 2e12})
    assert (ranks, hardware.read, hardware.link) == (16, 2e12, HARDWARE["h800"].link)
    file = tmp_path / "mine.yaml"
    file.write_text("read: 1e12\nfp8: 1e15\nbf16: 5e14\nfp32: 5e13\nranks: 4\n")
    hardware, ranks = read_hardware(str(file), {})
    assert (ranks, hardware.bf16) == (4, 5e14)
    for text, figures, fault in (
        ("h1000", {}, "--hardware=h1000 is no file and none of h100x8"),
        ("b300x8", {}, "none of h100x8, h200x8, a100x8, h800x8"),
        ("h100x8", {"raed": 1.0}, "unknown field 'raed'; did you mean 'read'"),
        ("h100x8", {"link": 0.0}, "link must be a number above 0"),
        ("h100x0", {}, "ranks must be a number above 0"),
    ):
        with pytest.raises(ConfigError, match=fault):
            read_hardware(text, figures)
    file.write_text("read: 1e12\n")
    with pytest.raises(ConfigError, match="missing 3 required"):
        read_hardware(str(file), {})


def test_ranking() -> None:
    lite = RooflineSetup(
        config=load_model_config("v2-lite-16b"), layout=ParallelConfig(), weights="bf16"
    )
    small = replace(H200, memory=16e9)
    report = rank_layouts(lite, 8, small, 64, 20000, 256)
    fits = [row["fits"] for row in report.rows]
    assert fits == sorted(fits, reverse=True) and {"yes", "no"} == set(fits)
    times = [row["decode ms"] for row in report.rows if row["fits"] == "yes"]
    assert times == sorted(times)
    best = report.rows[0]
    assert report.notes[0].startswith(f"fastest that fits: --tp {best['tp']} --dp {best['dp']} ")
    assert "moe.experts.gate_up" in report.notes[1] and "(bytes)" in report.notes[1]
    report = rank_layouts(lite, 8, replace(small, memory=1e9), 1, 100, 0)
    assert report.notes[0].startswith("nothing fits; fastest: --tp ")
    assert report.rows[0]["prefill ms"] is None and len(report.notes) == 3
    with pytest.raises(ConfigError, match="3 ranks: no tp x dp splits"):
        rank_layouts(lite, 3, H200, 1, 1, 1)


@pytest.mark.slow
def test_measured_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few small steps: the errors of predicted times are reported."""
    kinds = StepKind(1, 10, 1), StepKind(4, 64, 1), StepKind(1, 0, 64)
    monkeypatch.setattr(plan_measured, "CHECKED", kinds)
    report, figures = tmp_path / "report.json", tmp_path / "here.yaml"
    asked = ("--kv-cache-size", "1024tok", "--threads", "1", "--json", str(report))
    saved = ("--save-hardware", str(figures))
    assert bench.main(["plan", "--measure", *asked, *saved]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["step"] for row in rows] == ["1 x 1 after 10", "4 x 1 after 64", "1 x 64 after 0"]
    assert all(row["measured ms"] > 0 and row["floor ms"] > 0 for row in rows)
    assert [row["error %"] is None for row in rows] == [True, False, True]
    wanted = 100 * (rows[1]["predicted ms"] / rows[1]["measured ms"] - 1)
    assert rows[1]["error %"] == pytest.approx(wanted)
    hardware, ranks = read_hardware(str(figures), {})
    assert ranks == 1 and 0 < hardware.read <= 1e12
    paper = ("--hardware", str(figures), "--batch", "2", "--context", "64", "--dtype", "float32")
    assert bench.main(["plan", *paper, "--json", str(report)]) == 0
    setting = json.loads(report.read_text())["setting"]
    assert setting["weights"] == "fp32" and "threads" not in setting


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ((), "give --hardware"),
        (("--measure", "--hardware", "h100x8"), "--measure finds its own figures"),
        (
            ("--hardware", "h100x8", "--save-hardware", "x.yaml"),
            "--save-hardware writes",
        ),
        (("--hardware", "h100x8", "--figure", "read"), "'read' is not NAME=NUMBER"),
    ],
)
def test_wrong_commands(command: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        bench.main(["plan", *command])


def test_fit() -> None:
    floors, counts = np.array([1.0, 2, 9]), np.array([50.0, 50, 40])
    slower, launch = plan_measured.fit(np.stack([floors, counts, 1.5 * floors + 0.01 * counts]))
    assert (slower, launch) == pytest.approx((1.5, 0.01))
    assert plan_measured.fit(np.stack([floors, counts, floors / 2]))[0] == 1.0
    assert plan_measured.fit(np.stack([floors, counts, 1.5 * floors]))[1] < 1e-8


def test_balance(tmp_path: Path) -> None:
    report, file = tmp_path / "report.json", tmp_path / "placement.json"
    command = ("--ranks", "4", "--redundant-experts", "4", "--json", str(report))
    assert bench.main(["balance", *command, "--save", str(file)]) == 0
    result = json.loads(report.read_text())
    assert result["setting"]["ranks"] == "4" and "threads" not in result["setting"]
    before, after = result["rows"]
    assert 1 <= after["max/mean load"] < before["max/mean load"] <= 4
    assert (before["experts a rank"], after["experts a rank"]) == (4, 5)
    placement = balance.Placement.read(file)
    assert placement.num_physical == 20 and after["moved experts"] > 0
    loads = tmp_path / "loads.json"
    layers = {str(i): list(range(16)) for i in (1, 2, 3)}
    loads.write_text(json.dumps({"num_experts": 16, "layers": layers}))
    assert bench.main(["balance", *command, "--load", str(loads)]) == 0
    before, after = json.loads(report.read_text())["rows"]
    assert before["max/mean load"] == pytest.approx((12 + 13 + 14 + 15) / 30)
    with pytest.raises(ConfigError, match="of another model"):
        bench.main(["balance", *command, "--load", str(loads), "--config", "v2-lite-16b"])


@pytest.mark.slow
def test_both_are_benchmarks() -> None:
    done = run_forked(["launch/bench.py", "balance", "--ranks", "3"])
    assert done.returncode == 2
    assert programs.our_lines(done.stderr) == ["error: 3 ranks must divide n_routed_experts=16"]
    done = run_forked(["launch/bench.py", "plan", "--help"])
    assert done.returncode == 0 and "--save-hardware" in done.stdout
