"""Which tokens run in the next step. Rank 0 only; plain numbers, no tensors.

First come, first served. A request is admitted when the pages it may come to need (prompt and
longest answer) are free, so a running request never runs out of cache. Each step takes one token
of every sequence that is generating, then fills the token budget with prompt chunks.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pages import PageAllocator
from dsv3.engine.plan import NO_TARGET, StepPlan
from dsv3.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does for one sequence.

    Attributes:
        num_tokens: new tokens to compute.
        first_row: index of its first planned logits row.
        num_scored: rows that score prompt tokens.
        samples: whether one more row samples the next token.
    """

    seq: Sequence
    num_tokens: int
    first_row: int
    num_scored: int
    samples: bool


class Scheduler:
    """Waiting and running sequences, and the pages they hold."""

    def __init__(
        self, layout: CacheLayout, pages: PageAllocator, max_batch_tokens: int, max_running: int
    ) -> None:
        self._layout, self._pages = layout, pages
        self._max_batch_tokens, self._max_running = max_batch_tokens, max_running
        self._unreserved = pages.num_pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Put a sequence in line."""
        assert seq.reserved_pages <= self._pages.num_pages, "refused by Engine.add"
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that is done or cancelled; its pages become free."""
        if seq in self.running:
            self.running.remove(seq)
            self._pages.release(seq.pages)
            self._unreserved += seq.reserved_pages
        else:
            self.waiting.remove(seq)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            if self.waiting[0].reserved_pages > self._unreserved:
                return
            seq = self.waiting.popleft()
            self._unreserved -= seq.reserved_pages
            self.running.append(seq)

    def _choose(self) -> list[tuple[Sequence, int]]:
        """Return (sequence, new tokens) of the next step, ordered as `StepPlan` demands."""
        left = [(seq, len(seq.token_ids) - seq.num_computed) for seq in self.running]
        chosen = [(seq, count) for seq, count in left if count == 1]
        budget = self._max_batch_tokens - len(chosen)
        for seq, count in left:
            if count > 1 and budget > 0:
                chosen.append((seq, min(count, budget)))
                budget -= chosen[-1][1]
        return sorted(chosen, key=lambda work: (work[1], work[0].num_computed))

    def plan(self) -> tuple[StepPlan, list[Work]] | None:
        """Plan the next step, or return None when there is nothing to do."""
        self._admit()
        chosen = self._choose()
        if not chosen:
            return None
        rows, work, start = _Rows(), [], 0
        for seq, count in chosen:
            missing = self._layout.pages_for(seq.num_computed + count) - len(seq.pages)
            if missing > 0:
                seq.pages += self._pages.allocate(missing)
            first_row = len(rows.row)
            num_scored = rows.add_scored(seq, count, start)
            samples = seq.num_computed + count == len(seq.token_ids) and seq_samples(seq)
            if samples:
                rows.add_sampled(seq, start + count - 1)
            work.append(Work(seq, count, first_row, num_scored, samples))
            start += count
        plan = StepPlan(
            token_ids=_ints(
                t for s, n in chosen for t in s.token_ids[s.num_computed : s.num_computed + n]
            ),
            query_len=_ints(n for _, n in chosen),
            context_len=_ints(s.num_computed for s, _ in chosen),
            page_count=_ints(len(s.pages) for s, _ in chosen),
            pages=_ints(p for s, _ in chosen for p in s.pages),
        )
        rows.fill(plan)
        return plan, work


def seq_samples(seq: Sequence) -> bool:
    """Tell whether a sequence generates at all; a scored prompt does not."""
    return seq.request.params.max_tokens > 0


def _ints(values: object) -> np.ndarray:  # type: ignore[type-arg]
    return np.fromiter(values, np.int32)  # type: ignore[call-overload,no-any-return]


class _Rows:
    """Collects the logits rows of a plan."""

    def __init__(self) -> None:
        self.row: list[int] = []
        self.position: list[int] = []
        self.target: list[int] = []
        self.seqs: list[Sequence] = []
        self.top_logprobs: list[int] = []

    def _add(self, seq: Sequence, row: int, position: int, target: int, top: int | None) -> None:
        self.row.append(row)
        self.position.append(position)
        self.target.append(target)
        self.seqs.append(seq)
        self.top_logprobs.append(-1 if top is None else top)

    def add_scored(self, seq: Sequence, count: int, start: int) -> int:
        """Score the prompt tokens that follow the step's tokens; return how many."""
        top = seq.request.params.prompt_logprobs
        if top is None:
            return 0
        first = seq.num_computed
        last = min(first + count, seq.prompt_len - 1)
        for position in range(first, last):
            target = seq.token_ids[position + 1]
            self._add(seq, start + position - first, position + 1, target, top)
        return max(0, last - first)

    def add_sampled(self, seq: Sequence, row: int) -> None:
        """Sample the token after the last one."""
        position, params = len(seq.token_ids), seq.request.params
        self._add(seq, row, position, NO_TARGET, params.logprobs)

    def fill(self, plan: StepPlan) -> None:
        """Write the rows into a plan."""
        params = [seq.request.params for seq in self.seqs]
        seeds = np.array([p.seed for p in params], np.int64).view(np.int32).reshape(-1, 2)
        plan.row = _ints(self.row)
        plan.position = _ints(self.position)
        plan.target = _ints(self.target)
        plan.top_logprobs = _ints(self.top_logprobs)
        plan.top_k = _ints(min(p.top_k, 2**31 - 1) for p in params)
        plan.seed_low = np.ascontiguousarray(seeds[:, 0])
        plan.seed_high = np.ascontiguousarray(seeds[:, 1])
        plan.temperature = np.array([p.temperature for p in params], np.float32)
        plan.top_p = np.array([p.top_p for p in params], np.float32)
