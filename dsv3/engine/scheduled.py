"""A scheduler's choice for a step; the plan writer adds the rows of the results."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from dsv3.cache.tiers import Moves
from dsv3.engine.sequence import Sequence


@dataclass(slots=True)
class ScheduledSeq:
    """One sequence's part of a step.

    Attributes:
        seq: the sequence.
        num_tokens: new tokens that the step computes.
        is_last: the step computes all tokens that the sequence has so far.
        drafts: the last of the new tokens, which are drafts to be verified.
        num_samples: rows that give next tokens, those of drafts included; 0 if the last row is only
            checked: a row whose logits are not finite must not leave its cache entries to be
            reused.
        num_preempted: preemptions of the sequence before this step.
        num_scored: rows that score prompt tokens, ahead of the others. Set with the plan.
        draft_index: its place among the drafted sequences of all groups; -1 without drafts to come.
            Set with the plan.
        first_row: first row among the results of all groups. Set with the plan.
        start: position of the first new token. Set with the plan.
    """

    seq: Sequence
    num_tokens: int
    is_last: bool
    num_samples: int
    num_preempted: int
    drafts: Ordered[int] = ()
    num_scored: int = 0
    draft_index: int = -1
    first_row: int = -1
    start: int = -1

    @classmethod
    def of(
        cls, seq: Sequence, num_tokens: int, is_last: bool, drafts: Ordered[int] = ()
    ) -> "ScheduledSeq":
        """Schedule the next `num_tokens` tokens of a sequence, and drafts after them."""
        num_samples = 1 + len(drafts) if is_last and seq.request.params.max_tokens > 0 else 0
        num_new = num_tokens + len(drafts)
        return cls(seq, num_new, is_last, num_samples, seq.num_preempted, drafts)

    @property
    def num_known(self) -> int:
        """New tokens that are not drafts; more than one are of a prompt, or of a resumed text."""
        return self.num_tokens - len(self.drafts)

    @property
    def stop(self) -> int:
        """Positions of the sequence that are computed after the step."""
        return self.start + self.num_tokens

    @property
    def sampled_row(self) -> int:
        """Row of the first sampled token among the results of all groups."""
        return self.first_row + self.num_scored


@dataclass(slots=True)
class ScheduledStep:
    """One group's part of a step.

    Attributes:
        seqs: sequences in the order that `StepPlan` demands.
        copies: pages to copy first, (from, to): partial pages that are continued.
        moves: pages to move between the cache's tiers.
    """

    seqs: list[ScheduledSeq] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)
