"""Admission of waiting sequences: the longest cached prefix first, within bounds of fairness.

A sequence waits while a running one is about to compute much of its prefix, or while much of it is
on its way from disk. It can be skipped a limited number of times.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from dsv3.cache.prefix import Match
from dsv3.engine.sequence import Sequence

# Waiting sequences that compete for admission, and the times that one may be skipped.
_WINDOW = 32
_MAX_SKIPPED = 16
# Least common prefix with a running sequence, in tokens, that is worth waiting for.
_WORTH_WAITING = 32


@dataclass(slots=True)
class _Candidate:
    """A waiting sequence that competes for admission.

    Attributes:
        match: its longest cached prefix.
        num_compared: prefilling sequences that it was compared with.
        waits: more of its prefix will be cached soon.
    """

    match: Match
    num_compared: int = 0
    waits: bool = False


class Admission:
    """The admissions of one step; each candidate is looked up only once.

    Args:
        look_up: returns the cached prefix of a sequence.
        is_coming: returns True if more of the prefix than was found is on its way.
        running: sequences whose prefixes may be worth waiting for; None if none ever is.
    """

    def __init__(
        self,
        look_up: Callable[[Sequence], Match],
        is_coming: Callable[[Sequence, Match], bool],
        running: Iterable[Sequence] | None,
    ) -> None:
        self._look_up = look_up
        self._is_coming = is_coming
        self._never_waits = running is None
        # Running sequences whose prefixes are not all cached yet.
        self._prefilling = [seq for seq in running or () if seq.num_committed < seq.prompt_len]
        self._candidates: dict[Sequence, _Candidate] = {}

    def choose(self, waiting: list[Sequence]) -> Sequence | None:
        """Return the best of the waiting sequences, which are in order; None if all should wait.

        Only sequences of the best priority compete; one that was skipped too often wins.
        """
        best = None
        longest = -1
        for seq in islice(waiting, _WINDOW):
            if best is not None and seq.request.priority != best.request.priority:
                break
            candidate = self._candidate(seq)
            if candidate.waits:
                continue
            if seq.times_skipped >= _MAX_SKIPPED:
                return seq
            if candidate.match.num_tokens > longest:
                best = seq
                longest = candidate.match.num_tokens
        return best

    def admitted(self, seq: Sequence, waiting: list[Sequence]) -> None:
        """Record that a sequence was admitted and is about to be prefilled."""
        if not self._never_waits:
            self._prefilling.append(seq)
        for other in waiting:
            if other.order >= seq.order:
                break
            other.times_skipped += 1

    def _candidate(self, seq: Sequence) -> _Candidate:
        """Return the candidate of a sequence, compared with all sequences prefilling so far."""
        known = self._candidates.get(seq)
        candidate = known or _Candidate(self._look_up(seq))
        while not candidate.waits and candidate.num_compared < len(self._prefilling):
            other = self._prefilling[candidate.num_compared]
            candidate.waits = _shares_more(seq, other, candidate.match.num_tokens)
            candidate.num_compared += 1
        if known is None:
            self._candidates[seq] = candidate
            candidate.waits = candidate.waits or self._is_coming(seq, candidate.match)
        return candidate


def _shares_more(seq: Sequence, other: Sequence, num_cached: int) -> bool:
    """Return True if the prompt of `other` shares a long prefix, longer than the cached one."""
    length = max(_WORTH_WAITING, num_cached + 1)
    prompt = other.request.prompt_ids
    if length > min(seq.reuse_limit, len(prompt)):
        return False
    # The last token first: it differs in most cases.
    return prompt[length - 1] == seq.token_ids[length - 1] and (
        prompt[:length] == seq.token_ids[:length]
    )
