"""Writes scheduled steps as `StepPlan`s, and records each sequence's rows of the results."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsv3.engine.adjust import NOT_FED, AdjustedRow, pack_adjustments
from dsv3.engine.scheduled import ScheduledSeq, ScheduledStep
from dsv3.engine.sequence import PendingToken, Sequence, pack_choice
from dsv3.engine.speculation import Speculation
from dsv3.engine.step_plan import CHOICE, NO_TARGET, Ints, StepPlan, pack_pages
from dsv3.request import SamplingParams

_GREEDY = pack_choice(SamplingParams())


def write_plans(
    steps: list[ScheduledStep], number: int, speculation: Speculation, num_drafts: int
) -> list[StepPlan]:
    """Write a step, and advance all sequences past it.

    Args:
        steps: of each group.
        number: of the step.
        speculation: how tokens are drafted.
        num_drafts: drafts to make for each sequence. Without any, the MTP layer does not run.

    Returns:
        a plan for each group.
    """
    plans: list[StepPlan] = []
    for step in steps:
        drafting = _DraftingRows(speculation, num_drafts, sum(len(p.draft_row) for p in plans))
        plans.append(_write_plan(step, number, sum(len(plan.row) for plan in plans), drafting))
    return plans


def _write_plan(
    step: ScheduledStep, number: int, num_rows_before: int, drafting: "_DraftingRows"
) -> StepPlan:
    """Write one group's plan.

    Args:
        step: the group's part of the step.
        number: of the step.
        num_rows_before: rows of other groups among the results, ahead of this group's.
        drafting: takes the rows that the MTP layer continues.
    """
    rows = _ResultRows()
    token_ids: list[int] = []
    contexts = [part.seq.num_computed for part in step.seqs]
    for part in step.seqs:
        first_result = len(rows)
        first_row = len(token_ids)
        part.first_row = num_rows_before + first_result
        _write_sequence(part, number, token_ids, rows)
        if drafting.has_mtp:
            drafting.add(part, first_row, first_result + part.num_scored)
    plan = StepPlan(
        copies=_pairs(step.copies),
        offload=_pairs(step.moves.offload),
        restore=_pairs(step.moves.restore),
        store=pack_pages(step.moves.store),
        fetch=pack_pages(step.moves.fetch),
        confirm_fetched=_ints(step.moves.confirm_fetched),
        token_ids=_ints(token_ids),
        query_len=_ints(part.num_tokens for part in step.seqs),
        context_len=_ints(contexts),
        page_count=_ints(len(part.seq.pages) for part in step.seqs),
        pages=np.frombuffer(b"".join(part.seq.pages for part in step.seqs), np.int32),
    )
    rows.fill(plan)
    drafting.fill(plan)
    return plan


def _write_sequence(
    part: ScheduledSeq, number: int, token_ids: list[int], rows: "_ResultRows"
) -> None:
    """Add a sequence's new tokens and its result rows, and advance it past the step."""
    seq = part.seq
    part.start = seq.num_computed
    first_row = len(token_ids)
    stop = part.stop - len(part.drafts)
    if seq.request.params.prompt_logprobs is not None:
        part.num_scored = rows.add_scored(seq, stop, first_row)
    token_ids += seq.token_ids[part.start : stop]
    fed_row = NOT_FED
    if stop > len(seq.token_ids):
        assert seq.pending is not None and seq.pending.step == number - 1, f"{seq.pending=}"
        fed_row = seq.pending.row
        token_ids.append(-1 - fed_row)
    last_row = len(token_ids) - 1
    token_ids += part.drafts
    if part.num_samples:
        for i, mask in enumerate(_masks(part)):
            rows.add_sampled(seq, stop + i, last_row + i, fed_row, mask)
        seq.pending = PendingToken(number, len(rows) - 1)
    else:
        rows.add_checked(stop, last_row)
    seq.num_computed = part.stop


def _masks(part: ScheduledSeq) -> list[bytes]:
    """Return the masks of a sequence's sampled tokens; empty ones allow all tokens."""
    if part.seq.constraint is None:
        return [b""] * part.num_samples
    return part.seq.constraint.masks(part.seq.token_ids, part.drafts)


def _ints(values: Iterable[int]) -> Ints:
    return np.array(values if isinstance(values, list) else list(values), np.int32)


def _pairs(pairs: list[tuple[int, int]]) -> Ints:
    """Write all first elements, then all second ones."""
    return _ints([a for a, _ in pairs] + [b for _, b in pairs])


class _DraftingRow(NamedTuple):
    """Where the drafts of a sequence begin; see `StepPlan.draft_row` and the fields after it."""

    row: int
    result: int
    num_checked: int


class _DraftingRows:
    """Collects the tokens and rows that the MTP layer continues.

    Args:
        speculation: how tokens are drafted.
        num_drafts: drafts to make.
        num_before: drafted sequences of the groups before.

    Attributes:
        has_mtp: the model has its MTP layer.
    """

    def __init__(self, speculation: Speculation, num_drafts: int, num_before: int) -> None:
        self._speculation = speculation
        self.has_mtp = speculation.has_mtp
        self._num_drafts = num_drafts
        self._num_before = num_before
        self._next_ids: list[int] = []
        self._rows: list[_DraftingRow] = []

    def add(self, part: ScheduledSeq, first_row: int, first_result: int) -> None:
        """Add the tokens of a sequence that was written, if there is an MTP layer.

        Args:
            part: its part of the step.
            first_row: its first row in the batch.
            first_result: result of its last token before the drafts, within the group.
        """
        seq = part.seq
        if not self._runs_mtp:
            seq.num_undrafted += part.num_tokens
            return
        stop = part.stop - len(part.drafts)
        self._next_ids += seq.token_ids[part.start + 1 : stop]
        if stop < len(seq.token_ids):  # known, from a prompt or an earlier step
            self._next_ids.append(seq.token_ids[stop])
        else:  # results of this step, at the last token and at the drafts
            self._next_ids += (-1 - first_result - i for i in range(1 + len(part.drafts)))
        is_last_token = seq.num_generated + 1 >= seq.request.params.max_tokens
        if part.num_samples and not is_last_token and self._speculation.limit(seq):
            part.draft_index = self._num_before + len(self._rows)
            row = first_row + part.num_tokens - 1 - len(part.drafts)
            self._rows.append(_DraftingRow(row, first_result, len(part.drafts)))

    def fill(self, plan: StepPlan) -> None:
        """Write the rows into a plan."""
        if not self._runs_mtp:
            return
        plan.next_ids = _ints(self._next_ids)
        columns = np.array(self._rows, np.int32).reshape(-1, 3).T
        plan.draft_row, plan.draft_result, plan.draft_checked = map(np.ascontiguousarray, columns)
        plan.num_drafts = _ints([self._num_drafts])

    @property
    def _runs_mtp(self) -> bool:
        """True if the MTP layer runs in the step."""
        return self.has_mtp and self._num_drafts > 0


class _ResultRows:
    """Collects the rows of a plan whose logits are wanted."""

    def __init__(self) -> None:
        # Row of the batch, position, target, likeliest tokens to report.
        self._numbers: list[tuple[int, int, int, int]] = []
        self._choices: list[bytes] = []
        self._adjusted: list[AdjustedRow] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add_scored(self, seq: Sequence, stop: int, first_row: int) -> int:
        """Add the prompt tokens to score that were not scored before; return their number.

        Args:
            seq: the sequence.
            stop: positions computed after the step.
            first_row: row of its first new token in the batch.
        """
        num_top = seq.request.params.prompt_logprobs
        first = max(seq.num_computed, seq.num_scored)
        last = min(stop, seq.prompt_len - 1)
        seq.num_scored = max(seq.num_scored, last)
        for position in range(first, last):
            row = first_row + position - seq.num_computed
            self._add(seq.choice, row, position + 1, seq.token_ids[position + 1], num_top)
        return max(0, last - first)

    def add_sampled(
        self, seq: Sequence, position: int, row: int, fed_row: int, mask: bytes = b""
    ) -> None:
        """Sample the token of `position`; the one before may come from row `fed_row` in flight."""
        if seq.adjuster is not None:
            adjusted = AdjustedRow(len(self), fed_row, seq.adjuster, seq.token_ids, mask)
            self._adjusted.append(adjusted)
        self._add(seq.choice, row, position, NO_TARGET, seq.request.params.logprobs)

    def add_checked(self, position: int, row: int) -> None:
        """Check that the logits for `position` are finite, in the cheapest way."""
        self._add(_GREEDY, row, position, NO_TARGET, None)

    def _add(
        self, choice: bytes, row: int, position: int, target: int, num_top: int | None
    ) -> None:
        self._numbers.append((row, position, target, -1 if num_top is None else num_top))
        self._choices.append(choice)

    def fill(self, plan: StepPlan) -> None:
        """Write the rows into a plan."""
        numbers = np.array(self._numbers, np.int32).reshape(-1, 4)
        columns = np.ascontiguousarray(numbers.T)
        plan.row = columns[0]
        plan.position = columns[1]
        plan.target = columns[2]
        plan.top_logprobs = columns[3]
        choices = np.frombuffer(b"".join(self._choices), CHOICE)
        for name in CHOICE.names or ():
            setattr(plan, name, np.ascontiguousarray(choices[name]))
        plan.adjust = pack_adjustments(self._adjusted)
