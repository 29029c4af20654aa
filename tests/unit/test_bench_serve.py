"""Loads of bench.py serve, and the figures of their timings."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchlib.serving import Timing, poisson, read_load, serving_report
from benchlib.workload import BenchRequest
from dsv3.errors import ConfigError, RankError


def test_random_times_have_their_rate() -> None:
    requests = [BenchRequest([5], 1)] * 4000
    load = poisson(requests, 20.0, seed=1)
    assert load[0].at == 0
    assert load[-1].at == pytest.approx(200, rel=0.1)
    gaps = np.diff([arrival.at for arrival in load])
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as of an exponential one
    assert poisson(requests, 20.0, seed=1) == load


def row(at: int, length: int, blocks: list[int]) -> str:
    fields = {"timestamp": at, "input_length": length, "output_length": 7, "hash_ids": blocks}
    return json.dumps(fields) + "\n"


def test_a_trace_keeps_times_lengths_and_common_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(row(3000, 100, [1, 2]) + row(1000, 150, [1, 3, 4]) + row(1500, 9000, [5]))
    load = read_load(path, speed=2.0, limit=1000, vocab_size=2048)
    assert [arrival.at for arrival in load] == [0, 0.25, 1]
    first, longest, second = (arrival.request for arrival in load)
    assert [len(r.prompt_ids) for r in (first, longest, second)] == [150, 993, 100]
    assert first.prompt_ids[:50] == second.prompt_ids[:50]
    assert first.prompt_ids[50:100] != second.prompt_ids[50:100]
    assert all(100 <= i < 2048 for i in first.prompt_ids) and first.num_tokens == 7


@pytest.mark.parametrize("text", ["", "{}\n", "nonsense\n", row(0, 3, [1])[:-3]])
def test_a_damaged_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match="trace"):
        read_load(tmp_path / "trace", 1.0, 100, 200)


def test_figures_are_those_of_the_timings() -> None:
    done = Timing(begin=1.0, first=1.5, end=3.5, num_tokens=5, gaps=[0.5] * 4)
    failed = Timing(begin=1.0, end=2.0, error="refused")
    report = serving_report([done, failed], seconds=2.5)
    by_name = {row["time"]: row for row in report.rows}
    assert by_name["first token (ms)"]["p50"] == 500
    assert by_name["further token (ms)"]["mean"] == 500
    assert by_name["whole answer (ms)"]["p99"] == 2500
    assert report.setting == {"tokens_per_second": 2.0, "failed": 1}
    assert "1 requests failed; the first: refused" in report.notes
    with pytest.raises(RankError, match="no request was answered: refused"):
        serving_report([failed], 1.0)
