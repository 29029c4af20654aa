"""Contenders, what is measured of them, and the contest: all in one run, taking turns.

A machine is never quite idle and never quite the same: contenders run A B A B, and medians are
compared. CPU time is told beside the time by the clock, since others' load changes it less.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from benchlib.workload import BenchRequest
from dsv3.engine.engine import Engine
from dsv3.errors import Dsv3Error
from dsv3.request import Request, SamplingParams

log = logging.getLogger("dsv3")


@dataclass(slots=True, kw_only=True)
class RunResult:
    """What one run of some requests took.

    Attributes:
        seconds: by the clock, for all requests.
        cpu_seconds: of this process, all threads.
        first_token: seconds from the start to the first token of each request.
        between_tokens: seconds between neighbouring tokens, of all requests.
        host_step: mean seconds a step spent outside the model; None where that is not known.
        answers: the tokens of each request.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    host_step: float | None = None
    answers: list[list[int]] = field(default_factory=list)


class Contender(Protocol):
    """Something that can run requests."""

    name: str

    def reset(self) -> None:
        """Forget everything about earlier requests."""

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        """Answer all requests, greedily and at full length."""


class EngineContender:
    """Our engine.

    Args:
        name: what to call it.
        make: returns a new engine, whose cache holds nothing.
    """

    def __init__(self, name: str, make: Callable[[], Engine]) -> None:
        self.name, self._make = name, make
        self._engine = make()

    def reset(self) -> None:
        """Begin with an empty cache."""
        self._engine = self._make()

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        """Hand all requests to the engine at once; it runs as many together as it may."""
        out, engine = RunResult(answers=[[] for _ in requests]), self._engine
        host, steps = engine.metrics.host_seconds.total, engine.metrics.steps
        latest = [0.0] * len(requests)
        cpu, start = time.process_time(), time.perf_counter()
        for i, request in enumerate(requests):
            params = SamplingParams(max_tokens=request.num_tokens, ignore_eos=True)
            engine.add(Request(request_id=str(i), prompt_ids=request.prompt_ids, params=params))
        while engine.has_work():
            outputs, now = engine.step(), time.perf_counter() - start
            for output in outputs:
                i = int(output.request_id)
                (out.between_tokens if out.answers[i] else out.first_token).append(now - latest[i])
                out.answers[i] += output.new_token_ids
                if output.completion is not None and output.completion.error:
                    raise Dsv3Error(f"request {i}: {output.completion.error}")
                latest[i] = now
        out.seconds, out.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        num_steps = engine.metrics.steps - steps
        out.host_step = (engine.metrics.host_seconds.total - host) / max(1, num_steps)
        return out


def compete(
    contenders: Sequence[Contender], requests: Sequence[BenchRequest], repeats: int
) -> dict[str, list[RunResult]]:
    """Let every contender run the requests `repeats` times, in turns, after a run to warm up."""
    runs: dict[str, list[RunResult]] = defaultdict(list)
    for number in range(repeats + 1):
        for contender in contenders:
            what = f"run {number} of {repeats}" if number else "warm-up"
            log.info("%s: %s", contender.name, what)
            contender.reset()
            measured = contender.run(requests[:1] if number == 0 else requests)
            if number:
                runs[contender.name].append(measured)
    return runs


def middle(runs: Sequence[RunResult], figure: Callable[[RunResult], float]) -> float:
    """Return the median of a figure over several runs."""
    return median(figure(run) for run in runs)
