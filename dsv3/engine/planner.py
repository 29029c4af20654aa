"""Writes a scheduled step down as a `StepPlan`, and remembers what its rows are for."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsv3.engine.adjust import NOT_FED, AdjustedRow, pack_adjustments
from dsv3.engine.plan import NO_TARGET, Ints, StepPlan, pack_pages
from dsv3.engine.scheduler import Step
from dsv3.engine.sequence import Sequence, pack_choice
from dsv3.request import SamplingParams

_GREEDY = pack_choice(SamplingParams())


@dataclass(slots=True)
class Work:
    """What a planned step does for one sequence.

    Attributes:
        num_tokens: new tokens it computes.
        stop: positions computed after it.
        first_row: its first row among the results of all groups.
        num_scored: rows that score prompt tokens.
        is_last: whether the row after those gives the next token. Otherwise the row only shows
            that the logits are finite, before the new cache entries can be reused.
        num_preempted: how often the sequence had lost its pages when this was planned.
    """

    seq: Sequence
    num_tokens: int
    stop: int
    first_row: int
    num_scored: int
    is_last: bool
    num_preempted: int


def write_plans(steps: list[Step], number: int) -> tuple[list[StepPlan], list[Work]]:
    """Return the plans of step `number`, one a group, and advance all sequences past it."""
    plans: list[StepPlan] = []
    works: list[Work] = []
    for step in steps:
        plan, work = _write_plan(step, number, sum(len(plan.row) for plan in plans))
        plans.append(plan)
        works += work
    return plans, works


def _write_plan(step: Step, number: int, num_rows: int) -> tuple[StepPlan, list[Work]]:
    """Write one group's plan; the results of other groups' `num_rows` rows come before its own."""
    rows, work, tokens, start = _Rows(), [], [], 0
    context = [seq.num_computed for seq, _ in step.chosen]
    for seq, count in step.chosen:
        stop = seq.num_computed + count
        first_row = len(rows)
        num_scored = rows.add_scored(seq, stop, start)
        tokens += seq.token_ids[seq.num_computed : stop]
        fed = NOT_FED
        if stop > len(seq.token_ids):
            assert seq.pending is not None and seq.pending[0] == number - 1, f"{seq.pending=}"
            fed = seq.pending[1]
            tokens.append(-1 - fed)
        is_last = seq.num_left == count
        is_used = is_last and seq.request.params.max_tokens > 0
        if is_used:
            rows.add_sampled(seq, stop, start + count - 1, fed)
            seq.pending = number, len(rows) - 1
        else:
            rows.add_checked(stop, start + count - 1)
        seq.num_computed = stop
        at = num_rows + first_row
        work.append(Work(seq, count, stop, at, num_scored, is_last, seq.num_preempted))
        start += count
    plan = StepPlan(
        copies=_pairs(step.copies),
        offload=_pairs(step.moves.offload),
        restore=_pairs(step.moves.restore),
        store=pack_pages(step.moves.store),
        fetch=pack_pages(step.moves.fetch),
        confirm_fetched=_ints(step.moves.confirm_fetched),
        token_ids=_ints(tokens),
        query_len=_ints(count for _, count in step.chosen),
        context_len=_ints(context),
        page_count=_ints(len(seq.pages) for seq, _ in step.chosen),
        pages=np.frombuffer(b"".join(seq.pages for seq, _ in step.chosen), np.int32),
    )
    rows.fill(plan)
    return plan, work


def _ints(values: Iterable[int]) -> Ints:
    return np.array(values if isinstance(values, list) else list(values), np.int32)


def _pairs(pairs: list[tuple[int, int]]) -> Ints:
    """Write all first elements, then all second ones."""
    return _ints([a for a, _ in pairs] + [b for _, b in pairs])


class _Rows:
    """Collects the logits rows of a plan."""

    def __init__(self) -> None:
        self._numbers: list[tuple[int, int, int, int]] = []
        self._choices: list[bytes] = []
        self._adjusted: list[AdjustedRow] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def _add(self, choice: bytes, row: int, position: int, target: int, top: int | None) -> None:
        self._numbers.append((row, position, target, -1 if top is None else top))
        self._choices.append(choice)

    def add_scored(self, seq: Sequence, stop: int, start: int) -> int:
        """Score the prompt tokens after the step's, unless that was done; return how many."""
        top = seq.request.params.prompt_logprobs
        if top is None:
            return 0
        first = max(seq.num_computed, seq.num_scored)
        last = min(stop, seq.prompt_len - 1)
        seq.num_scored = max(seq.num_scored, last)
        for position in range(first, last):
            row = start + position - seq.num_computed
            self._add(seq.choice, row, position + 1, seq.token_ids[position + 1], top)
        return max(0, last - first)

    def add_sampled(self, seq: Sequence, position: int, row: int, fed: int) -> None:
        """Sample the token of `position`; the one before may come from row `fed` in flight."""
        if seq.adjuster is not None:
            self._adjusted.append(AdjustedRow(len(self), fed, seq.adjuster, seq.token_ids))
        self._add(seq.choice, row, position, NO_TARGET, seq.request.params.logprobs)

    def add_checked(self, position: int, row: int) -> None:
        """Look at the logits for `position`, whose token is not used: in the cheapest way."""
        self._add(_GREEDY, row, position, NO_TARGET, None)

    def fill(self, plan: StepPlan) -> None:
        """Write the rows into a plan."""
        numbers = np.array(self._numbers, np.int32).reshape(-1, 4)
        plan.row, plan.position, plan.target, plan.top_logprobs = np.ascontiguousarray(numbers.T)
        words = np.frombuffer(b"".join(self._choices), np.int32).reshape(-1, 7)
        words_7M = np.ascontiguousarray(words.T)
        plan.top_k, plan.seed_low, plan.seed_high, plan.answer = words_7M[:4]
        plan.temperature, plan.top_p, plan.min_p = words_7M[4:].view(np.float32)
        plan.adjust = pack_adjustments(self._adjusted)
