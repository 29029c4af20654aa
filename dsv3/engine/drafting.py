"""Rank 0's part of speculation: how many drafts a step makes, and which of them are accepted."""

from collections import Counter
from collections.abc import Sequence as Ordered

from dsv3.engine.draft_count import DraftCount
from dsv3.engine.metrics import Metrics
from dsv3.engine.scheduled import ScheduledSeq
from dsv3.engine.speculation import Speculation
from dsv3.engine.step_result import HostResult


class Drafting:
    """The drafts of all sequences, step by step.

    Args:
        speculation: how tokens are drafted.
        is_adaptive: choose the number of drafts by measurement.
        metrics: counts drafts.

    Attributes:
        num_drafts: drafts of each sequence that the current step makes.
    """

    def __init__(self, speculation: Speculation, is_adaptive: bool, metrics: Metrics) -> None:
        self._speculation = speculation
        self._count = DraftCount(speculation.num_drafts, is_adaptive)
        self._metrics = metrics
        self.num_drafts = 0
        # Drafts that the step before made, which the current one verifies.
        self._num_verified = 0

    def begin_step(self, num_sequences: int) -> None:
        """Choose the number of drafts that a step of `num_sequences` in a group makes."""
        self._num_verified = self.num_drafts
        self.num_drafts = self._count.choose(num_sequences) if num_sequences else 0

    def verify(self, part: ScheduledSeq, result: HostResult) -> None:
        """Shorten a sequence's part of a step to the accepted drafts."""
        if not self._speculation.num_drafts:
            return
        num_drafts = len(part.drafts)
        if not num_drafts:
            self._count.verified(0, 0)
            return
        first = part.sampled_row
        num_accepted = count_matches(part.drafts, result.token[first : first + num_drafts].tolist())
        self._metrics.count_drafts(num_drafts, num_accepted)
        self._count.verified(num_drafts, num_accepted)
        num_rejected = num_drafts - num_accepted
        part.drafts = part.drafts[:num_accepted]
        part.num_tokens -= num_rejected
        part.num_samples -= num_rejected
        if part.seq.is_running and part.seq.num_preempted == part.num_preempted:
            # The next step overwrites the entries of rejected drafts.
            part.seq.num_computed -= num_rejected

    def next_drafts(self, part: ScheduledSeq, result: HostResult) -> list[int]:
        """Return the drafts that a sequence's next step verifies."""
        if not self.num_drafts:
            return []
        by_mtp = [] if part.draft_index < 0 else result.drafts[part.draft_index]
        return self._speculation.next_drafts(part.seq, by_mtp)[: self.num_drafts]

    def measure(self, parts: list[ScheduledSeq], seconds: float) -> None:
        """Record the time of a step by its kind; one in which the number changes is of no kind."""
        if not self._speculation.num_drafts or self.num_drafts != self._num_verified:
            return
        if all(part.start >= part.seq.prompt_len for part in parts):
            largest = max(Counter(part.seq.group for part in parts).values())
            self._count.measure(largest, self.num_drafts, seconds)
        else:
            num_tokens = sum(part.num_tokens for part in parts)
            self._count.measure_prompts(num_tokens, self.num_drafts, seconds)


def count_matches(drafts: Ordered[int], tokens: Ordered[int]) -> int:
    """Return the number of drafts before the first one that differs from the sampled token."""
    count = 0
    for draft, token in zip(drafts, tokens, strict=False):
        if draft != token:
            break
        count += 1
    return count
