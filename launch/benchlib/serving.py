"""Load on a running server: requests at random times, one after another, or as a trace has them."""

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchlib.report import Report
from benchlib.workload import BenchRequest
from dsv3.errors import ConfigError, RankError

_QUANTILES = (0.5, 0.9, 0.99)
_CURVE = tuple(range(5, 100, 5))
_TIMEOUT = 600.0
_MOST_OPEN = 4096
_FIRST_TOKEN = 100  # of the tokens that prompts are made of; lower ones may be control tokens


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a load; `at` is in seconds after its begin."""

    at: float
    request: BenchRequest


@dataclass(slots=True)
class Timing:
    """The times of one request, in seconds.

    Attributes:
        begin: when it was sent.
        gaps: time per token of each piece after the first.
        error: the reason that it has no complete answer.
    """

    begin: float
    first: float | None = None
    end: float = 0.0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str = ""


class Target:
    """A server under load.

    Args:
        url: its address.
        key: of the server; empty needs none.
    """

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url={url} is not an address such as http://127.0.0.1:8000")
        self._parts = parts
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        try:
            self.model = self._model()
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise ConfigError(f"--url={url} is no server that answers: {error}") from None

    def _connect(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=_TIMEOUT)

    def _model(self) -> dict[str, Any]:
        connection = self._connect()
        connection.request("GET", f"{self._parts.path}/v1/models", headers=self._headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != http.client.OK:
            raise ValueError(answer["error"]["message"])
        model: dict[str, Any] = answer["data"][0]
        return model

    def answer(self, request: BenchRequest) -> Timing:
        """Send a request and read its answer; errors are in the result."""
        timing = Timing(time.monotonic())
        try:
            for count in self._stream(request):
                now = time.monotonic()
                if timing.first is None:
                    timing.first = now
                elif count:
                    timing.gaps += [(now - timing.end) / count] * count
                timing.num_tokens += count
                timing.end = now
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            timing.error = str(error) or type(error).__name__
        timing.end = time.monotonic()
        if not timing.error and timing.num_tokens < request.num_tokens:
            timing.error = f"{timing.num_tokens} tokens instead of {request.num_tokens}"
        return timing

    def _stream(self, request: BenchRequest) -> Iterator[int]:
        """Yield the number of tokens of each piece of the answer."""
        body = {
            "model": self.model["id"],
            "prompt": request.prompt_ids,
            "max_tokens": request.num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        connection = self._connect()
        try:
            path = f"{self._parts.path}/v1/completions"
            connection.request("POST", path, json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ValueError(json.loads(response.read())["error"]["message"])
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                for choice in event["choices"]:
                    yield len(choice["token_ids"])
        finally:
            connection.close()


def poisson(requests: Sequence[BenchRequest], rate: float, seed: int) -> list[Arrival]:
    """Return requests at random times, `rate` of them a second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))
    times = np.cumsum(gaps) - gaps[0]
    return [Arrival(float(at), r) for at, r in zip(times, requests, strict=True)]


def read_load(path: Path, speed: float, limit: int, vocab_size: int) -> list[Arrival]:
    """Return the requests of a trace, whose equal blocks of prompts have equal tokens.

    Args:
        path: JSON Lines with `timestamp` (milliseconds), `input_length`, `output_length` and
            `hash_ids`.
        speed: times as fast as in the trace.
        limit: most tokens of a request; longer prompts are cut.
        vocab_size: of the model.
    """
    arrivals = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                num_tokens = max(1, min(int(row["output_length"]), limit // 2))
                length = max(1, min(int(row["input_length"]), limit - num_tokens))
                at = float(row["timestamp"]) / 1000 / speed
                prompt = _prompt(row["hash_ids"], length, int(row["input_length"]), vocab_size)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}:{number}: not a request of a trace: {error}") from error
            arrivals.append(Arrival(at, BenchRequest(prompt, num_tokens)))
    if not arrivals:
        raise ConfigError(f"{path} has no requests")
    begin = min(arrival.at for arrival in arrivals)
    ordered = sorted(arrivals, key=lambda arrival: arrival.at)
    return [Arrival(arrival.at - begin, arrival.request) for arrival in ordered]


def _prompt(blocks: Sequence[int], length: int, whole_length: int, vocab_size: int) -> list[int]:
    """Return the tokens of a prompt, made of its blocks."""
    size = max(1, -(-whole_length // max(1, len(blocks))))
    low = min(_FIRST_TOKEN, vocab_size - 1)
    ids: list[int] = []
    for block in blocks:
        if len(ids) >= length:
            break
        ids += np.random.default_rng(abs(int(block))).integers(low, vocab_size, size).tolist()
    return (ids or [low])[:length]


def open_loop(target: Target, load: Sequence[Arrival]) -> tuple[list[Timing], float]:
    """Send each request at its time, whatever the server does; return timings and seconds."""
    begin = time.monotonic()
    with ThreadPoolExecutor(min(_MOST_OPEN, len(load))) as pool:
        futures = []
        for arrival in load:
            time.sleep(max(0.0, begin + arrival.at - time.monotonic()))
            futures.append(pool.submit(target.answer, arrival.request))
        timings = [future.result() for future in futures]
    return timings, time.monotonic() - begin


def closed_loop(
    target: Target, requests: Sequence[BenchRequest], concurrency: int
) -> tuple[list[Timing], float]:
    """Keep `concurrency` requests open until all are answered; return timings and seconds."""
    begin = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        timings = list(pool.map(target.answer, requests))
    return timings, time.monotonic() - begin


def serving_report(timings: Sequence[Timing], seconds: float) -> Report:
    """Return the latencies and the throughput of a load.

    Raises:
        RankError: no request was answered.
    """
    done = [timing for timing in timings if not timing.error and timing.first is not None]
    errors = [timing.error for timing in timings if timing.error]
    if not done:
        raise RankError(f"no request was answered: {errors[0] if errors else 'no tokens'}")
    figures = {
        "first token (ms)": [1e3 * ((t.first or t.end) - t.begin) for t in done],
        "further token (ms)": [1e3 * gap for timing in done for gap in timing.gaps],
        "whole answer (ms)": [1e3 * (timing.end - timing.begin) for timing in done],
    }
    report = Report("serve", x_label="percentile", y_label="ms")
    for name, values in figures.items():
        if not values:
            continue
        row: dict[str, Any] = {"time": name, "mean": float(np.mean(values))}
        row |= {f"p{100 * q:g}": float(np.quantile(values, q)) for q in _QUANTILES}
        report.rows.append(row)
        report.series[name] = (_CURVE, [float(np.percentile(values, q)) for q in _CURVE])
    num_tokens = sum(timing.num_tokens for timing in done)
    report.notes.append(
        f"{len(done)} requests answered in {seconds:.1f} s: {len(done) / seconds:.2f} requests "
        f"and {num_tokens / seconds:.1f} generated tokens a second"
    )
    if errors:
        report.notes.append(f"{len(errors)} requests failed; the first: {errors[0]}")
    report.setting["tokens_per_second"] = round(num_tokens / seconds, 2)
    report.setting["failed"] = len(errors)
    return report
