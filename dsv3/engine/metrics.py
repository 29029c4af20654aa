"""Figures of an engine: counters, gauges, histograms, and a summary.

Counters and gauges are plain numbers, so that counting costs nothing. An engine owns one `Metrics`;
only its thread writes to it, any thread may read.
"""

# ruff: noqa: RUF009 (the calls in Metrics make fields, not values)

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dsv3.settings import MAX_DRAFTS

# Ten steps a decade, from 10 us to 1000 s.
SECONDS = tuple(10 ** (exponent / 10) for exponent in range(-50, 31))
COUNTS = tuple(2.0**exponent for exponent in range(18))
_MOST_RECENT = 10_000  # observations that quantiles are taken of


class Histogram:
    """Observations sorted into buckets, and the most recent ones as they were.

    Attributes:
        bounds: upper bounds of the buckets, ascending; one more bucket takes the rest.
        counts: observations in each bucket.
        total: sum of the observations.
    """

    __slots__ = ("_recent", "bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self._recent = deque[float](maxlen=_MOST_RECENT)

    def observe(self, value: float) -> None:
        """Add an observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
        self._recent.append(value)

    @property
    def count(self) -> int:
        """All observations."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Their mean; 0 if there are none."""
        return self.total / max(1, self.count)

    def quantile(self, q: float) -> float:
        """Return the observation that a share `q` of the recent ones does not exceed; 0 if none."""
        ordered = sorted(self._recent)
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def _number(kind: str, about: str) -> Any:
    return field(default=0, metadata={"kind": kind, "about": about})


def _list(kind: str, about: str) -> Any:
    metadata = {"kind": kind, "about": about}
    return field(default_factory=lambda: [0] * MAX_DRAFTS, metadata=metadata)


def _histogram(bounds: tuple[float, ...], about: str) -> Any:
    metadata = {"kind": "histogram", "about": about}
    return field(default_factory=partial(Histogram, bounds), metadata=metadata)


_counter = partial(_number, "counter")
_counters = partial(_list, "counters")
_gauge = partial(_number, "gauge")
_seconds = partial(_histogram, SECONDS)
_counts = partial(_histogram, COUNTS)


@dataclass(slots=True)
class Metrics:
    """One engine's figures in tokens, pages and seconds, each with its description."""

    steps: int = _counter("steps run")
    requests: int = _counter("requests answered")
    prefill_tokens: int = _counter(
        "tokens of prompts, and of answers that lost their pages, computed"
    )
    reused_tokens: int = _counter("tokens found in the cache instead")
    decode_tokens: int = _counter("generated tokens computed, with rejected drafts")
    answer_tokens: int = _counter("tokens of answers")
    drafted_tokens: int = _counter("tokens drafted and verified")
    accepted_tokens: int = _counter("drafts that were accepted")
    preemptions: int = _counter("times a running request lost its pages to an earlier one")
    evictions: int = _counter("cached pages dropped for want of room")
    offloads: int = _counter("evicted pages kept in host memory")
    host_hits: int = _counter("pages copied back from host memory")
    disk_hits: int = _counter("pages read from disk into host memory")
    disk_writes: int = _counter("files written to the disk cache")
    run_seconds: float = _counter("time spent in steps")
    sent_bytes: int = _counter("bytes that rank 0 sent to other ranks")

    waiting: int = _gauge("requests in line")
    running: int = _gauge("requests in progress")
    pages_used: int = _gauge("pages that requests hold, and pinned ones")
    pages_pinned: int = _gauge("cached pages that are never evicted")
    pages_idle: int = _gauge("cached pages that no request holds")
    pages_free: int = _gauge("empty pages")
    disk_bytes: int = _gauge("bytes of the disk cache, of all models and runs")

    queue_seconds: Histogram = _seconds("time from a request's arrival to its first step")
    first_token_seconds: Histogram = _seconds("time from a request's arrival to its first token")
    token_seconds: Histogram = _seconds("time per token after the first, a mean for each request")
    host_seconds: Histogram = _seconds("time of a step spent on planning and committing")
    step_sequences: Histogram = _counts("sequences in a step")
    step_tokens: Histogram = _counts("new tokens in a step")

    accepted_drafts: Histogram = _counts("accepted drafts of a sequence in a step that had some")
    drafted_at: list[int] = _counters("drafts verified at each place after the last known token")
    accepted_at: list[int] = _counters("drafts accepted at each place after the last known token")

    def count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts of one sequence that a step has verified."""
        self.drafted_tokens += num_drafts
        self.accepted_tokens += num_accepted
        self.accepted_drafts.observe(num_accepted)
        for place in range(num_drafts):
            self.drafted_at[place] += 1
            self.accepted_at[place] += place < num_accepted

    @property
    def accepted_per_position(self) -> list[int]:
        """Accepted drafts by their place after the last known token, as far as there were any."""
        return self.accepted_at[: sum(count > 0 for count in self.drafted_at)]

    @property
    def hit_rate(self) -> float:
        """Share of the prefixes' tokens that was found in the cache."""
        return self.reused_tokens / max(1, self.reused_tokens + self.prefill_tokens)

    def summary(self) -> str:
        """Return a two-line summary of the run."""
        first = self.first_token_seconds
        computed = self.prefill_tokens + self.decode_tokens
        tiers = f"; {self.host_hits:,} pages back from host memory, {self.disk_hits:,} from disk"
        return (
            f"{self.prefill_tokens:,} tokens prefilled, {self.reused_tokens:,} reused "
            f"({self.hit_rate:.0%} hit rate), {self.decode_tokens:,} decoded, "
            f"{computed / max(self.run_seconds, 1e-9):,.0f} computed a second\n"
            f"first token after {first.quantile(0.5):.3g} s (95 %: {first.quantile(0.95):.3g} s), "
            f"{1e3 * self.token_seconds.mean:.3g} ms a further one; {self.steps:,} steps of "
            f"{self.step_sequences.mean:.1f} sequences, {1e3 * self.host_seconds.mean:.2g} ms of "
            f"each on the host; {self.preemptions:,} preemptions, {self.evictions:,} evictions"
            f"{tiers if self.offloads or self.disk_hits else ''}"
        )
