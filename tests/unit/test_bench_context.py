"""`bench.py context`: sparse attention reads as many entries at every context."""

import dataclasses
import json
from pathlib import Path

import pytest

import bench
from benchlib.context import context_report
from benchlib.step_shape import StepKind
from dsv3.config import ModelConfig
from dsv3.config_files import hf_config_dict
from dsv3.errors import ConfigError
from dsv3_kernels import packed_bytes
from tests.checkpoint_files import TINY
from tests.distributed.ranks import CPU

SPARSE = dataclasses.replace(
    TINY, model_type="deepseek_v32", index_n_heads=4, index_head_dim=32, index_topk=48
)
LENGTHS = (40, 200, 700)
ENTRY, KEY = (128 + 16) * 4, 32 * 4
STEPS = [
    *(StepKind(batch, length - 1, 1) for batch in (1, 3) for length in LENGTHS),
    *(StepKind(1, length - new, new) for new in (8, 199) for length in LENGTHS if length > new),
]


def config_file(folder: Path, config: ModelConfig) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(hf_config_dict(config)))
    return path


def test_bytes_are_those_of_what_is_read() -> None:
    report = context_report(SPARSE, CPU, STEPS, "fp32", "fp32", repeats=2)
    rows = {(row["step"], row["context"], row["form"]): row for row in report.rows}
    assert len(rows) == len(report.rows) == 2 * len(STEPS) == 2 * len(report.notes)
    for step in STEPS:
        dense, sparse = (rows[step.name, step.length, form] for form in ("dense", "sparse"))
        read = {row["form"]: row["attention MB read"] * 1e6 for row in (dense, sparse)}
        if step.new <= 8:  # attends to the cache itself
            assert read["dense"] == pytest.approx(step.batch * step.length * ENTRY)
        else:  # its own keys are those of the step, and not read
            assert read["dense"] == pytest.approx(step.context * ENTRY)
        assert dense["index MB read"] == 0 < dense["index ms"], "its keys are written"
        if step.length <= 48:
            assert read["sparse"] == read["dense"] and sparse["index MB read"] == 0
            continue
        seen = [min(48, position + 1) for position in range(step.context, step.length)]
        assert read["sparse"] == pytest.approx(step.batch * sum(seen) * ENTRY)
        scored = step.batch * step.length * KEY
        assert sparse["index MB read"] * 1e6 == pytest.approx(scored)
        for row in (dense, sparse):
            assert 0 < row["attention ms"] + row["index ms"] < row["layer ms"]
    xs, ys = report.series["decode 3, sparse"]
    assert tuple(xs) == LENGTHS and len(ys) == 3


def test_in_fp8_entries_are_smaller() -> None:
    (_, sparse) = context_report(SPARSE, CPU, [StepKind(1, 99, 1)], "fp8", "fp8", 1).rows
    assert sparse["attention MB read"] * 1e6 == pytest.approx(48 * packed_bytes(128, 16))
    assert sparse["index MB read"] * 1e6 == pytest.approx(100 * (32 + 4))


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = config_file(tmp_path, SPARSE), tmp_path / "out.json"
    flags = f"--config {config} --lengths 60 120 --batch 2 --chunk 4 --heads 4 --repeats 1"
    assert bench.main(["context", *flags.split(), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["setting"]["heads"] == 4 and len(report["rows"]) == 8
    assert "prefill 4 at 120: dense attention takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--chunk 61 --lengths 60", "--chunk=61 is longer than --lengths=60"),
        ("--heads 9", "--heads=9, but the model has 8"),
        ("--batch 0", "not a number of 1 or more"),
    ],
)
def test_wrong_flags(tmp_path: Path, flags: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        bench.main(["context", "--config", str(config_file(tmp_path, SPARSE)), *flags.split()])


def test_a_model_without_an_indexer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no indexer"):
        bench.main(["context", "--config", str(config_file(tmp_path, TINY))])
