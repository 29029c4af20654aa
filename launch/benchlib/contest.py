"""Compare engines in one run: contenders, their results, and the alternating runs.

No machine is quite idle or unchanging, so contenders run A B A B, and medians are compared. CPU
time is reported with wall-clock time because other processes disturb it less.
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
    """Times and answers of one run of several requests.

    Attributes:
        seconds: wall-clock time of all requests.
        cpu_seconds: CPU time of this process, all threads.
        first_token: seconds from the start to the first token of each request.
        between_tokens: seconds between neighbouring tokens, of all requests.
        host_step: mean seconds of a step outside the model; None if unknown.
        answers: answer tokens of each request.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    host_step: float | None = None
    answers: list[list[int]] = field(default_factory=list)


class Contender(Protocol):
    """An engine that can answer benchmark requests."""

    name: str

    def reset(self) -> None:
        """Discard all state of earlier requests."""

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        """Answer all requests greedily, each at full length."""


class EngineContender:
    """The dsv3 engine.

    Args:
        name: label in the report.
        make_engine: returns a new engine with an empty cache.
        ignore_eos: answers have full length.

    Attributes:
        engine: the engine of the last run, or of the next one after `reset`.
    """

    def __init__(
        self, name: str, make_engine: Callable[[], Engine], ignore_eos: bool = True
    ) -> None:
        self.name = name
        self._ignore_eos = ignore_eos
        self._make_engine = make_engine
        self.engine = make_engine()

    def reset(self) -> None:
        """Replace the engine by one with an empty cache."""
        self.engine = self._make_engine()

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        """Add all requests to the engine at once; its limits decide how many run together."""
        engine = self.engine
        result = RunResult(answers=[[] for _ in requests])
        host_before = engine.metrics.host_seconds.total
        steps_before = engine.metrics.steps
        last_token_at = [0.0] * len(requests)
        cpu_start = time.process_time()
        start = time.perf_counter()
        for i, request in enumerate(requests):
            params = SamplingParams(max_tokens=request.num_tokens, ignore_eos=self._ignore_eos)
            engine.add(Request(request_id=str(i), prompt_ids=request.prompt_ids, params=params))
        while engine.has_work():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                i = int(output.request_id)
                delays = result.between_tokens if result.answers[i] else result.first_token
                delays.append(now - last_token_at[i])
                result.answers[i] += output.new_token_ids
                if output.completion is not None and output.completion.error:
                    raise Dsv3Error(f"request {i}: {output.completion.error}")
                last_token_at[i] = now
        result.seconds = time.perf_counter() - start
        result.cpu_seconds = time.process_time() - cpu_start
        num_steps = engine.metrics.steps - steps_before
        host_seconds = engine.metrics.host_seconds.total - host_before
        result.host_step = host_seconds / max(1, num_steps)
        return result


def compete(
    contenders: Sequence[Contender], requests: Sequence[BenchRequest], repeats: int
) -> dict[str, list[RunResult]]:
    """Run the requests `repeats` times on each contender, alternating, after one warm-up run."""
    runs: dict[str, list[RunResult]] = defaultdict(list)
    for number in range(repeats + 1):
        for contender in contenders:
            log.info(
                "%s: %s", contender.name, f"run {number} of {repeats}" if number else "warm-up"
            )
            contender.reset()
            result = contender.run(requests[:1] if number == 0 else requests)
            if number:
                runs[contender.name].append(result)
    return runs


def median_of(runs: Sequence[RunResult], figure: Callable[[RunResult], float]) -> float:
    """Return the median of a figure over several runs."""
    return median(figure(run) for run in runs)
