"""Benchmarks measure what they say, on paper: workloads, contests, dialogues, reports."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import bench
from benchlib.contest import EngineContender, RunResult, compete, median_of
from benchlib.dialogue import Dialogue, dialogue
from benchlib.host import host_time
from benchlib.launches import launch_time
from benchlib.report import Report, machine
from benchlib.throughput import throughput
from benchlib.workload import BenchRequest, Lengths, draw_requests
from dsv3.config_files import load_model_config
from dsv3.engine.engine import Engine
from dsv3.errors import ConfigError, OutputError
from dsv3.settings import EngineConfig
from dsv3_kernels._triton import HAS_TRITON
from tests.checkpoint_files import TINY
from tests.paper_runner import paper_engine


@pytest.mark.parametrize(
    ("text", "low", "high"), [("7", 7, 7), ("uniform:3:9", 3, 9), ("lognormal:40:0.5", 4, 400)]
)
def test_lengths(text: str, low: int, high: int) -> None:
    lengths = Lengths.parse(text)
    assert str(lengths) == text
    drawn = lengths.draw(np.random.default_rng(0), 1000)
    assert low <= min(drawn) and max(drawn) <= high
    if text.startswith("uniform"):
        assert set(drawn) == set(range(3, 10))
    if text.startswith("lognormal"):
        assert 36 < np.median(drawn) < 44


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "x",
        "-3",
        "nan",
        "inf",
        "uniform:3",
        "uniform:0:4",
        "uniform:5:2",
        "normal:1:2",
        "fixed:",
    ],
)
def test_no_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="no distribution of lengths"):
        Lengths.parse(text)


def test_jobs_come_from_the_seed_and_fit_the_context() -> None:
    wide = Lengths.parse("uniform:1:90"), Lengths.parse("lognormal:30:1")
    requests = draw_requests(200, *wide, vocab_size=50, limit=64, seed=1)
    assert requests == draw_requests(200, *wide, vocab_size=50, limit=64, seed=1)
    assert requests != draw_requests(200, *wide, vocab_size=50, limit=64, seed=2)
    assert all(
        1 <= len(request.prompt_ids) <= 63 and request.num_tokens >= 1 for request in requests
    )
    assert max(len(request.prompt_ids) + request.num_tokens for request in requests) == 64
    assert {token for request in requests for token in request.prompt_ids} == set(range(50))


class Clockwork:
    """A contender with given run times."""

    def __init__(self, name: str, seconds: Sequence[float], log: list[tuple[str, int]]) -> None:
        self.name = name
        self._seconds = list(seconds)
        self._log = log

    def reset(self) -> None:
        self._log.append((self.name, 0))

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        self._log.append((self.name, len(requests)))
        seconds = self._seconds.pop(0)
        return RunResult(
            seconds=seconds,
            cpu_seconds=seconds / 2,
            first_token=[seconds / 10] * len(requests),
            between_tokens=[seconds / 100] * len(requests),
            answers=[[1, 2, 3] for _ in requests],
        )


JOBS = [BenchRequest([1, 2, 3], 4), BenchRequest([5], 2)]


def test_contenders_take_turns() -> None:
    log: list[tuple[str, int]] = []
    a, b = Clockwork("a", [9, 1, 2, 6], log), Clockwork("b", [9, 5, 5, 5], log)
    runs = compete([a, b], JOBS, 3)
    assert log == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] + 3 * [
        ("a", 0), ("a", 2), ("b", 0), ("b", 2)
    ]  # fmt: skip
    assert [run.seconds for run in runs["a"]] == [1, 2, 6]
    assert median_of(runs["a"], lambda run: run.seconds) == 2


def test_throughput() -> None:
    log: list[tuple[str, int]] = []
    contenders = [Clockwork("ours", [9, 1, 2, 6], log), Clockwork("theirs", [9, 5, 5, 5], log)]
    report = throughput(contenders, JOBS, 3)
    ours, theirs = report.rows
    assert (ours["requests/s"], ours["prompt tok/s"], ours["answer tok/s"]) == (1.0, 2.0, 3.0)
    assert theirs["first token s"] == theirs["p95"] == 0.5 and ours["host ms/step"] is None
    assert report.notes == [
        "ours is 2.50 times as fast as theirs by the clock, 2.50 times by CPU time "
        "(medians of 3 runs each, in turns); 2 of 2 answers are the same"
    ]
    assert report.series["ours"] == (["ours"], [3.0])


def test_the_engine_competes() -> None:
    contender = EngineContender("dsv3", lambda: paper_engine(50, max_running=2)[0])
    requests = [BenchRequest([3, 4, 5], 4), BenchRequest([6], 2), BenchRequest([7, 8], 1)]
    first, again = contender.run(requests), contender.run(requests)
    assert [len(answer) for answer in first.answers] == [4, 2, 1]
    assert first.answers == again.answers
    assert len(first.first_token) == 3 and len(first.between_tokens) == 3 + 1
    assert min(first.first_token) > 0 and max(first.first_token) <= first.seconds
    assert first.host_step is not None and 0 < first.host_step < first.seconds


def test_a_dialogue_computes_new_tokens_only() -> None:
    engines: list[Engine] = []

    def make(reuse: bool) -> Engine:
        engines.append(paper_engine(200, max_batch_tokens=500, prefix_reuse=reuse)[0])
        return engines[-1]

    shape = Dialogue(turns=4, user=10, answer=5)
    contenders = [
        EngineContender("reuse", lambda: make(True)),
        EngineContender("no reuse", lambda: make(False)),
    ]
    report = dialogue(contenders, shape, vocab_size=300, repeats=2)
    assert shape.num_tokens == 60
    assert [row["context"] for row in report.rows] == [0, 15, 30, 45]
    assert [row["new"] for row in report.rows] == [10, 11, 11, 11]
    assert all(row["reuse: ms"] > 0 and row["no reuse: ms"] > 0 for row in report.rows)
    assert len(report.notes) == 2 and report.notes[0].startswith("reuse: turn 4 takes ")
    # Two engines to begin with, then one for each of three dialogues of both contenders.
    prefilled = [engine.metrics.prefill_tokens for engine in engines]
    assert prefilled[2:] == [43, 10 + 25 + 40 + 55] * 3


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_launch_time() -> None:
    """Nothing is computed, so a model of any size takes no memory."""
    report = launch_time(load_model_config("v3-671b"), context=100, steps=1)
    assert len(report.rows) == 3
    assert all(15 < row["launches a layer"] < 25 for row in report.rows)
    assert all(row["calls a layer"] > 10 * row["launches a layer"] for row in report.rows)


def test_host_time() -> None:
    settings = EngineConfig(max_running=5)
    report = host_time(TINY, settings, None, context=70, steps=6)
    planning, building = report.rows
    assert planning["ms a step"] == "planning and committing"
    for row in (planning, building):
        assert 0 < row["p10"] <= row["median"] <= row["p95"]
    assert report.notes == ["5 sequences of 70 tokens and more, 6 steps, without text"]


def test_reports(tmp_path: Path) -> None:
    report = Report("chat", setting={"turns": 3} | machine(2))
    report.rows = [
        {"name": "a", "count": 5, "ms": 1234.5, "host": None},
        {"name": "long", "count": 50, "ms": 0.01234, "host": 2.0},
    ]
    report.notes = ["a note"]
    lines = str(report).splitlines()
    assert lines[0].startswith("turns 3, ranks 2, threads ")
    assert lines[2:] == [
        "name  count      ms  host",
        "a         5   1,234     -",
        "long     50  0.0123     2",
        "",
        "a note",
    ]
    report.write_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report.rows
    report.write_json(tmp_path / "report.json")
    with pytest.raises(OutputError, match=r"--json=.*: cannot be written"):
        report.write_json(tmp_path / "no" / "report.json")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=r"--json=.*: another file is there, not the report of"):
        report.write_json(tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'


def test_files_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("")
    (tmp_path / "notes.json").write_text("mine")
    for path, reason in (
        (trace, f"--json={trace}: the same file as trace={trace}"),
        (tmp_path / "notes.json", "another file is there"),
        (tmp_path / "no" / "report.json", "there is no such directory"),
    ):
        with pytest.raises(ConfigError, match=reason):
            bench.main(["cache", str(trace), "--json", str(path)])
    assert (tmp_path / "notes.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("host --profile", "unrecognized arguments: --profile"),
        ("host --tp 2", "leave --tp and --dp out"),
        ("throughput --hardware h100", "--hardware gives the ceilings of --profile"),
        ("serve --rate 0", "--rate=0.0 must be above 0"),
        ("serve --prompt-len 0", "no distribution of lengths"),
    ],
)
def test_flags_that_a_benchmark_does_not_use(command: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        bench.main(command.split())


def test_one_rank_is_not_measured_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "environment_world_size", lambda: 2)
    for name, benchmark in bench.BENCHMARKS.items():
        if benchmark.has_ranks:
            continue
        needed = ["trace"] if name == "cache" else []
        with pytest.raises(ConfigError, match=f"^{name} runs on one rank; start it with python"):
            bench.main([name, *needed])
    on_ranks = {name for name, benchmark in bench.BENCHMARKS.items() if benchmark.has_ranks}
    assert on_ranks == {"throughput", "drafts", "chat", "dispatch", "exchange", "plan"}


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report("cache", series={"lru": ([1, 2], [3.0, 4.0]), "one": (["x"], [1.0])})
    report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report.plot(tmp_path / "a.png")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of mine")
    with pytest.raises(OutputError, match="another file is there, not a picture that matplotlib"):
        report.plot(tmp_path / "photo.png")
    with pytest.raises(OutputError, match=r"--plot=.*: cannot be written"):
        report.plot(tmp_path / "no" / "a.png")
