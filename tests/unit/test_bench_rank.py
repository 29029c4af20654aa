"""One rank alone: it holds what that rank of the world would, and its times are accounted for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from benchlib import rank as rank_module
from benchlib.bound import weight_format
from benchlib.case_log import CaseLog, read_results
from benchlib.experts_hit import mean_hits
from benchlib.hardware import HARDWARE, hardware
from benchlib.kernel_timing import KernelEvent, kernel_table
from benchlib.rank import rank_report
from benchlib.rank_formats import formats_report
from benchlib.rank_share import Rank, RankShape
from benchlib.rank_steps import StepResult
from benchlib.report import Report
from benchlib.step_shape import StepKind
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.stand_in import StandIn, stand_in_mesh
from dsv3.engine.memory import weight_bytes
from dsv3.errors import ConfigError, RankError
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix
from tests.distributed.ranks import CPU

DEMO_CONFIG = load_model_config(DEMO)


def shape(world: int = 2, rank: int = 1, **more: Any) -> RankShape:
    plain = replace(DEMO_CONFIG, quantization=None)
    return RankShape(config=plain, world=world, rank=rank, weights="fp32", cache="fp32", **more)


def test_a_stand_in_has_the_shapes_of_a_group() -> None:
    x = torch.arange(6.0).view(3, 2)
    for moves in (True, False):
        group = StandIn(1, 3, moves)
        assert torch.equal(group.all_reduce(x), x) and torch.equal(group.all_to_all(x), x)
        assert torch.equal(group.all_gather(x), torch.stack((x, x, x)))
        # Only moved bytes are new memory.
        results = group.all_reduce(x), group.all_gather(x), group.all_to_all(x)
        assert [y.data_ptr() != x.data_ptr() for y in results] == [moves] * 3


def test_the_share_is_that_of_the_rank() -> None:
    whole = replace(DEMO_CONFIG, num_hidden_layers=3)
    for world, rank in ((1, 0), (2, 1), (4, 3)):
        made = Rank(replace(shape(world, rank, layers=3), config=whole, weights="fp8"), CPU, 64)
        layout = ParallelConfig(world_size=world, rank=rank)
        matrices = [m for m in made.model.modules() if isinstance(m, Matrix)]
        in_fp8 = [m for m in matrices if m.weight.dtype == torch.float8_e4m3fn]
        names = frozenset(n for m in in_fp8 for part in m.names for n in part)
        assert any("experts.0." in n or "experts.15." in n for n in names)
        fmt = WeightFormat(torch.bfloat16, CPU, names)
        assert made.model.num_bytes == weight_bytes(whole, stand_in_mesh(layout, CPU), fmt)
        assert all(torch.isfinite(p.float()).all() for p in made.model.parameters())
    first = [p.clone() for p in Rank(shape(seed=1), CPU, 64).model.parameters()]
    again = Rank(shape(seed=1), CPU, 64).model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kv_shard", ["tokens", "none"])
def test_a_rank_is_measured(kv_shard: str) -> None:
    rank = shape(layers=2, kv_shard=kv_shard)
    report = rank_report(rank, CPU, HARDWARE["h100"], [1, 3], context=70, prefill=200, steps=2)
    kinds = {row["step"] for row in report.rows}
    assert kinds == {"decode 1 at 70", "decode 3 at 70", "prefill 200"}
    for kind in kinds:
        rows = {row["operation"]: row for row in report.rows if row["step"] == kind}
        assert {"self_attn", "moe", "mlp.down_proj", "lm_head", "layers.sum_norm"} <= rows.keys()
        assert rows["layers.sum_norm"]["calls"] == 4 and rows["layers"]["calls"] == 2
        sums = [rows[f"{where}.sum_norm.all_reduce"]["calls"] for where in ("layers", "model")]
        assert sums == [3, 1]
        assert sum(row["share %"] for row in rows.values()) == pytest.approx(100)
        is_gathered = kv_shard == "tokens" and kind.startswith("decode")
        assert ("self_attn.all_gather" in rows) == is_gathered
        # The lowest measured values: none is lost.
        assert all(row["floor ms"] > 0 for n, row in rows.items() if n in ("moe", "self_attn"))
    assert len(report.notes) == 6
    assert "all 4 layers at the same rates" in report.notes[1]


def test_experts_are_hit_evenly() -> None:
    ranks = [Rank(shape(rank=r, seed=3), CPU, 64 * 64) for r in (0, 1)]
    hits = [rank.count_hits(rank.plan(StepKind(64, 0, 1))) for rank in ranks]
    entries = 64 * DEMO_CONFIG.num_experts_per_tok
    assert hits[0].rows + hits[1].rows == pytest.approx(entries, rel=0.1)
    assert hits[0].rows == pytest.approx(entries / 2, rel=0.25)


def test_a_plan_reaches_the_usual_number_of_experts() -> None:
    rank = Rank(shape(seed=3), CPU, 64 * 64)
    step = StepKind(2, 8, 1)
    usual = mean_hits(DEMO_CONFIG, 2, 2).experts
    drawn = [rank.count_hits(rank.plan(step)).experts for _ in range(10)]
    chosen = [rank.usual_plan(step) for _ in range(6)]
    spread = max(abs(hits - usual) for hits in drawn)
    assert max(abs(each.hits.experts - usual) for each in chosen) < spread
    assert rank.count_hits(chosen[-1].plan) == chosen[-1].hits


def test_a_step_that_raises_costs_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, rows = rank_module.measure_step, tmp_path / "rows.jsonl"
    errors: dict[str, Exception | None] = {"decode 2 at 8": ValueError("no such tile")}

    def failing(rank: Rank, name: str, *more: Any) -> StepResult:
        if error := errors.get(name):
            raise error
        return measure(rank, name, *more)

    def report() -> Report:
        sizes: dict[str, Any] = {"batches": [1, 2, 3, 4], "context": 8, "prefill": 0, "steps": 1}
        return rank_report(shape(layers=2), CPU, HARDWARE["h100"], **sizes, log=CaseLog(rows))

    monkeypatch.setattr(rank_module, "measure_step", failing)
    first = report()
    assert {row["step"] for row in first.rows} == {f"decode {b} at 8" for b in (1, 3, 4)}
    assert first.failures == ["decode 2 at 8: ValueError: no such tile"]
    with pytest.raises(
        RankError, match="failed, without figures: decode 2 at 8: ValueError: no such tile"
    ):
        first.raise_failures()
    results = read_results(rows)
    assert [row["result"] for row in results.rows] == ["passed", "failed", "passed", "passed"]
    assert results.rows[0]["ms"] > 0 and results.rows[0]["kernel table"] == []
    assert not report().rows, "all steps are in the file"
    rows.unlink()
    errors["decode 3 at 8"] = RuntimeError("CUDA error: an illegal memory access")
    spoiled = report()
    assert {row["step"] for row in spoiled.rows} == {"decode 1 at 8"}
    assert len(spoiled.failures) == 2 and "cannot use the GPU" in spoiled.notes[-1]


def test_kernels_are_added_up_by_name() -> None:
    events = [("gemm(int)", 0.0, 2e-6), ("norm", 2e-6, 3e-6), ("gemm(float)", 4e-6, 8e-6)]
    gemm, norm = kernel_table([KernelEvent(*event) for event in events])
    assert gemm["kernel"] == "gemm" and gemm["launches"] == 2
    assert gemm["us"] == pytest.approx(6.0) and gemm["us each"] == pytest.approx(3.0)
    assert norm["share %"] == pytest.approx(100 / 7)
    report = Report("rank", tables={"kernels of a step": [gemm, norm]})
    assert "kernels of a step:\nkernel  launches" in str(report)


def test_no_such_rank() -> None:
    made = Rank(replace(shape(), weights="fp8"), CPU, 64)  # of a model that is stored in bfloat16
    assert any(p.dtype == torch.float8_e4m3fn for p in made.model.parameters())
    with pytest.raises(ConfigError, match="does not divide"):
        Rank(shape(world=3, rank=0), CPU, 64)
    assert hardware("h800", CPU).link == 160e9


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8", "int8", "int4"])
def test_the_format_of_a_model_is_found_in_its_weights(weights: str) -> None:
    made = Rank(replace(shape(layers=2), weights=weights), CPU, 64)
    assert weight_format(made.model) == weights


def test_formats_are_measured_in_turns() -> None:
    shapes = [replace(shape(), weights=weights) for weights in ("fp32", "bf16", "fp8", "int4")]
    report = formats_report(shapes, CPU, [1, 3], 64, steps=2)
    assert [(row["batch"], row["weights"]) for row in report.rows] == [
        (batch, weights) for batch in (1, 3) for weights in ("fp32", "bf16", "fp8", "int4")
    ]
    for row in report.rows:
        assert row["tokens/s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert (row["best ms"] <= row["ms"] and row["weights"] != "fp32") or row["x"] == 1
    sizes = [row["GiB"] for row in report.rows[:4]]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


def test_several_formats_are_measured_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(DEMO), "--world", "1", "--layers", "2", "--device", "cpu"]
    flags += ["--batch", "1", "--context", "64", "--steps", "1", "--weights", "fp32", "int8"]
    assert bench.main(["rank", *flags]) == 0
    assert "CPU x" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give one format"):
        bench.main(["rank", *flags, "--prefill", "64"])
