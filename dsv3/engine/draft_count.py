"""The number of drafts of a step that gives most tokens a second, learnt while running.

A step with k drafts of each sequence gives 1 + a_1 + a_1 a_2 + ... tokens of each, where a_j is the
share of drafts accepted at place j if those before were. It takes longer than a step without: how
much longer depends on the batch and the machine, so it is measured.
"""

from collections import defaultdict

# Steps of each kind that are measured first, and steps after which another number is tried again.
_TRIES = 4
_AGAIN = 256
# Weight of the newest measurement in the averages.
_NEWEST_SECONDS = 0.2
_NEWEST_SHARE = 0.05


class DraftCount:
    """Chooses the number of drafts of every step.

    Args:
        most: most drafts of a sequence.
        is_adaptive: choose by measurement; otherwise `most` always.
    """

    def __init__(self, most: int, is_adaptive: bool) -> None:
        self._most = most
        self._is_adaptive = is_adaptive
        self._share = [0.8] * most
        # By the size class of the batch, and the number of drafts.
        self._seconds: dict[tuple[int, int], float] = {}
        self._num_measured: dict[tuple[int, int], int] = defaultdict(int)
        self._num_chosen = 0

    def choose(self, num_sequences: int) -> int:
        """Return the number of drafts to make for the next step."""
        if not self._is_adaptive or not self._most:
            return self._most
        size = num_sequences.bit_length()
        self._num_chosen += 1
        for count in range(self._most, -1, -1):
            if self._num_measured[size, count] < _TRIES:
                return count
        best = max(range(self._most + 1), key=lambda count: self._speed(size, count))
        if self._num_chosen % _AGAIN < _TRIES:  # the machine or the text may have changed
            return best - 1 if best else 1
        return best

    def _speed(self, size: int, count: int) -> float:
        """Return the expected tokens of a sequence a second."""
        tokens = reach = 1.0
        for share in self._share[:count]:
            reach *= share
            tokens += reach
        return tokens / self._seconds[size, count]

    def measure(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """Record the time of a step of decoding sequences, each with up to `num_drafts` drafts."""
        key = num_sequences.bit_length(), num_drafts
        known = self._seconds.get(key, seconds)
        # A step during which the machine did something else says little.
        self._seconds[key] = known + _NEWEST_SECONDS * (min(seconds, 2 * known) - known)
        self._num_measured[key] += 1

    def verified(self, num_drafts: int, num_accepted: int) -> None:
        """Record the drafts of a sequence."""
        for place in range(min(num_drafts, num_accepted + 1)):
            is_accepted = float(place < num_accepted)
            self._share[place] += _NEWEST_SHARE * (is_accepted - self._share[place])
