"""Metrics: sums, quantiles, and their export to Prometheus over HTTP."""

import socket
import sys
from dataclasses import fields
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsv3.engine.metrics import COUNTS, SECONDS, Histogram, Metrics
from dsv3.errors import ConfigError
from dsv3.request import Request, SamplingParams
from dsv3.serve.exporter import serve_metrics
from tests.paper_runner import finish, paper_engine


def test_every_figure_is_explained() -> None:
    every = [figure.metadata for figure in fields(Metrics)]
    assert {figure["kind"] for figure in every} == {"counter", "counters", "gauge", "histogram"}
    assert len({figure["about"] for figure in every}) == len(every)


def test_quantiles() -> None:
    histogram = Histogram(SECONDS)
    assert histogram.quantile(0.5) == histogram.mean == 0.0
    for i in range(1, 1001):
        histogram.observe(i / 1000)
    assert histogram.count == 1000 and histogram.mean == pytest.approx(0.5005)
    for q in (0.05, 0.5, 0.95, 1.0):
        assert histogram.quantile(q) == q
    for _ in range(20_000):
        histogram.observe(0.25)
    assert histogram.quantile(0.05) == histogram.quantile(0.95) == 0.25


def test_observations_beyond_the_buckets() -> None:
    histogram = Histogram(COUNTS)
    for value in (0, 1, 2**30):
        histogram.observe(value)
    assert histogram.counts[0] == 2 and histogram.counts[-1] == 1
    assert histogram.quantile(1.0) == 2**30


def parse(text: str) -> dict[str, float]:
    """Read Prometheus's text format."""
    return {
        s.name + "".join(f"{{{name}={value}}}" for name, value in s.labels.items()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def served(metrics: Metrics) -> str:
    with (
        serve_metrics(metrics, "127.0.0.1", 0) as port,
        urlopen(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return answer.read().decode()


def test_prometheus_text() -> None:
    metrics = Metrics(steps=3, prefill_tokens=30, reused_tokens=10, run_seconds=0.5)
    metrics.pages_free = 7
    for seconds in (0.002, 0.02, 5000.0):
        metrics.first_token_seconds.observe(seconds)
    metrics.count_drafts(num_drafts=2, num_accepted=1)
    values = parse(served(metrics))
    assert values["dsv3_drafted_tokens_total"] == 2 and values["dsv3_accepted_tokens_total"] == 1
    assert (
        values["dsv3_accepted_at_total{place=1}"] == values["dsv3_drafted_at_total{place=2}"] == 1
    )
    assert values["dsv3_accepted_at_total{place=2}"] == 0
    assert values["dsv3_steps_total"] == 3 and values["dsv3_run_seconds_total"] == 0.5
    assert values["dsv3_pages_free"] == 7
    assert values["dsv3_first_token_seconds_bucket{le=0.01}"] == 1
    assert values["dsv3_first_token_seconds_bucket{le=1000}"] == 2
    assert values["dsv3_first_token_seconds_bucket{le=+Inf}"] == 3
    assert values["dsv3_first_token_seconds_count"] == 3
    assert values["dsv3_first_token_seconds_sum"] == pytest.approx(5000.022)


def test_an_engine_counts() -> None:
    engine, _ = paper_engine(100, page_size=4, max_batch_tokens=20, max_running=2)
    prompts = {"a": range(2, 42), "b": range(2, 44), "c": range(50, 53)}
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    for name, prompt in prompts.items():
        engine.add(Request(request_id=name, prompt_ids=list(prompt), params=params))
    engine.step()
    m = engine.metrics
    # The step is full of a's first half; b will wait for the rest of it.
    assert (m.steps, m.running, m.waiting, m.prefill_tokens) == (1, 1, 2, 20)
    assert m.pages_used == 5 and m.pages_free == 95 and m.pages_idle == 0
    finish(engine)
    assert m.requests == 3 and m.waiting == m.running == m.pages_used == 0
    assert m.prefill_tokens + m.reused_tokens == 40 + 42 + 3
    assert m.reused_tokens == 40 and m.hit_rate == pytest.approx(40 / 85)
    assert m.decode_tokens == 3 * 4
    assert m.pages_idle + m.pages_free == 100
    assert m.step_tokens.total == m.prefill_tokens + m.decode_tokens
    assert m.step_tokens.count == m.step_sequences.count == m.host_seconds.count == m.steps
    assert m.queue_seconds.count == m.first_token_seconds.count == m.token_seconds.count == 3
    assert 0 <= m.host_seconds.total <= m.run_seconds
    first, second = m.summary().splitlines()
    assert first.startswith("45 tokens prefilled, 40 reused (47% hit rate), 12 decoded, ")
    assert second.endswith(" on the host; 0 preemptions, 0 evictions")


def test_pinned_pages() -> None:
    engine, _ = paper_engine(100, page_size=4, max_batch_tokens=20, max_running=2)
    engine.prewarm([list(range(2, 12))])
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.add(Request(request_id="a", prompt_ids=[2, 3, 50], params=params))
    finish(engine)
    assert engine.metrics.pages_pinned == engine.metrics.pages_used == 3


def test_served_over_http() -> None:
    """Only at the address that was asked for; the figures are those of the moment."""
    metrics = Metrics(steps=1)
    with serve_metrics(metrics, "127.0.0.1", 0) as port:
        metrics.steps = 2
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert parse(answer.read().decode())["dsv3_steps_total"] == 2
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port)):
            pass
        with pytest.raises(ConfigError, match=f"--metrics-port={port} cannot be listened on"):
            serve_metrics(metrics, "127.0.0.1", port).__enter__()
    with serve_metrics(metrics, "127.0.0.1", port):
        pass


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"--metrics-port=1: .* pip install prometheus-client"):
        serve_metrics(Metrics(), "127.0.0.1", 1).__enter__()
