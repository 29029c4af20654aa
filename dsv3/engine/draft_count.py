"""The number of drafts of a step that gives most tokens a second, learnt while running.

A step with k drafts of each sequence gives 1 + a_1 + a_1 a_2 + ... tokens of each, where a_j is the
share of drafts accepted at place j if those before were. It takes longer than a step without
drafts, and with any, the MTP layer also runs on prompts. How much longer depends on the batch and
the machine, so it is measured. The number goes up and down by one, so nothing that is far too slow
is tried.
"""

from collections import defaultdict
from typing import NamedTuple

# Steps of each kind that are measured before they are compared, and steps after which the next
# larger number is tried again: the machine or the text may have changed.
_TRIES = 4
_AGAIN = 512
# Another number must be this much faster.
_MARGIN = 1.05
# Weight of the newest measurement in the averages.
_NEWEST_SECONDS = 0.2
_NEWEST_SHARE = 0.05


class _StepKind(NamedTuple):
    """Steps whose times are averaged.

    Attributes:
        size: bits of the number of sequences: batches of about the same size.
        num_drafts: drafts of each sequence.
    """

    size: int
    num_drafts: int


class DraftCount:
    """Chooses the number of drafts of every step.

    Args:
        most: most drafts of a sequence.
        is_adaptive: choose by measurement; otherwise `most` always.
    """

    def __init__(self, most: int, is_adaptive: bool) -> None:
        self._most = most
        self._is_adaptive = is_adaptive
        # Share of the drafts verified at each place that were accepted; a guess at first.
        self._share = [0.8] * most
        # Seconds of a step for each sequence.
        self._seconds: dict[_StepKind, float] = {}
        self._num_measured: dict[_StepKind, int] = defaultdict(int)
        # Seconds of a prompt's token, without the MTP layer (False) and with it.
        self._prompt_seconds: dict[bool, float] = {}
        # The number that is used now, by size.
        self._best: dict[int, int] = defaultdict(int)
        # Tokens of prompts and of answers so far, and calls of `choose`.
        self._num_prompt = self._num_answer = self._num_chosen = 0

    def choose(self, num_sequences: int) -> int:
        """Return the number of drafts to make for the next step."""
        if not self._is_adaptive or not self._most:
            return self._most
        size = num_sequences.bit_length()
        best = self._best[size]
        more = min(best + 1, self._most)
        self._num_chosen += 1
        if self._num_chosen % _AGAIN == 0:
            self._num_measured[_StepKind(size, more)] = 0
        for count in (best, more):
            if self._num_measured[_StepKind(size, count)] < _TRIES:
                return count
        if self._cost(size, best) > _MARGIN * self._cost(size, more):
            self._best[size] = more
        elif best and self._cost(size, best) > self._cost(size, best - 1):
            self._best[size] = best - 1
        return self._best[size]

    def _cost(self, size: int, count: int) -> float:
        """Return the expected seconds of an answer's token, its share of the prompt included."""
        tokens = reach = 1.0  # drafts are accepted up to a place with the product of its shares
        for share in self._share[:count]:
            reach *= share
            tokens += reach
        prompt = self._prompt_seconds.get(count > 0, self._prompt_seconds.get(False, 0.0))
        prompt_per_answer = self._num_prompt / max(1, self._num_answer)
        return self._seconds[_StepKind(size, count)] / tokens + prompt_per_answer * prompt

    def measure(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """Record the time of a step of decoding sequences, each with up to `num_drafts` drafts."""
        kind = _StepKind(num_sequences.bit_length(), num_drafts)
        self._seconds[kind] = _averaged(self._seconds.get(kind), seconds / num_sequences)
        self._num_measured[kind] += 1

    def measure_prompts(self, num_tokens: int, num_drafts: int, seconds: float) -> None:
        """Record the time of a step with prompts."""
        has_mtp = num_drafts > 0
        known = self._prompt_seconds.get(has_mtp)
        self._prompt_seconds[has_mtp] = _averaged(known, seconds / num_tokens)
        self._num_prompt += num_tokens

    def verified(self, num_drafts: int, num_accepted: int) -> None:
        """Record a sequence's tokens of a step: its accepted drafts, and one more."""
        self._num_answer += 1 + num_accepted
        for place in range(min(num_drafts, num_accepted + 1)):
            is_accepted = float(place < num_accepted)
            self._share[place] += _NEWEST_SHARE * (is_accepted - self._share[place])


def _averaged(known: float | None, newest: float) -> float:
    """Return the new average; a step during which the machine did something else says little."""
    if known is None:
        return newest
    return known + _NEWEST_SECONDS * (min(newest, 2 * known) - known)
