"""Estimates of when cached pages are reused, learned from pages of the same kind.

Ages are integers in the policy's logical time, in buckets of half an octave: bucket k holds the
ages from sqrt(2)^k up to sqrt(2)^(k + 1).
"""

from itertools import pairwise
from math import isqrt
from typing import NamedTuple

# Prior: of the pages that reach a bucket, this share is reused in it, in every bucket. So the rate
# of reuse falls as 1 / age and the oldest page is worth least.
_PRIOR_HAZARD = 0.05
# Weight of the prior or of the parent curve, in observations.
_PRIOR_WEIGHT = 20.0
# After this number of lives a curve halves its counts, so that old observations fade.
_MEMORY = 4096.0


def age_bucket(age: int) -> int:
    """Return the bucket of an age >= 1."""
    return (age * age).bit_length() - 1


def bucket_start(bucket: int) -> int:
    """Return the lowest integer age in a bucket; the next higher one if the bucket has none."""
    return isqrt((1 << bucket) - 1) + 1


class ReuseCurve:
    """Observed reuses of one kind of pages, and the worth of such a page at every age.

    A life begins when a page is used and ends when it is used again. The worth at age a is the best
    rate, in reuses per unit of time held, of all plans "hold the page until its reuse or age b"
    from there on: max over b of P(reused before b) / E(time held until then), a Gittins index. So a
    page that is likely to be reused soon can be worth more than one that was just used.

    Args:
        num_buckets: buckets of age; older pages count as in the last one.
        parent: curve of a similar kind, used as the prior: its ages of reuse, scaled to the number
            of reuses observed here.

    Attributes:
        worth: by bucket of age.
    """

    __slots__ = ("_hazard", "_num_seen", "_parent", "_refresh_at", "_reused", "_survived", "worth")

    def __init__(self, num_buckets: int, parent: "ReuseCurve | None" = None) -> None:
        self._parent = parent
        self._reused = [0.0] * num_buckets
        self._survived = [0.0] * num_buckets
        self._num_seen = 0.0
        self._refresh_at = 0.0
        self._hazard = [_PRIOR_HAZARD] * num_buckets
        self.refresh()

    def observe(self, bucket: int, *, reused: bool) -> None:
        """Record that a page was reused at an age of this bucket, or grew older unused."""
        counts = self._reused if reused else self._survived
        counts[bucket] += 1
        self._num_seen += 1
        # Refreshed whenever an eighth of the observations is new: a negligible cost per event.
        if self._num_seen >= self._refresh_at:
            self.refresh()

    def refresh(self) -> None:
        """Compute the curve from the observations."""
        if self._survived[0] + self._reused[0] > _MEMORY:
            self._reused = [count / 2 for count in self._reused]
            self._survived = [count / 2 for count in self._survived]
            self._num_seen /= 2
        self._refresh_at = self._num_seen * 9 / 8 + 1
        self._hazard = self._estimate()
        self.worth = _worth(self._hazard)

    def _estimate(self) -> list[float]:
        """Return for each bucket the share of the pages reaching it that is reused in it."""
        prior_hazard = [_PRIOR_HAZARD] * len(self._hazard)
        if self._parent is not None:
            prior_hazard = self._parent._hazard
        seen = [r + s for r, s in zip(self._reused, self._survived, strict=True)]
        num_expected = sum(n * h for n, h in zip(seen, prior_hazard, strict=True))
        scale = (sum(self._reused) + _PRIOR_WEIGHT) / (num_expected + _PRIOR_WEIGHT)
        hazard = []
        for k, h in enumerate(prior_hazard):
            # Neighbouring buckets are pooled: the true curve is smooth, the counts are small.
            near = slice(max(0, k - 1), k + 2)
            prior = _PRIOR_WEIGHT * min(0.9, scale * h)
            hazard.append((sum(self._reused[near]) + prior) / (sum(seen[near]) + _PRIOR_WEIGHT))
        return hazard


class _Stretch(NamedTuple):
    """A range of ages in which a page is held.

    Attributes:
        gain: expected reuses in it, of a page that reaches it.
        time: expected time in it.
        survival: probability of leaving it unused.
    """

    gain: float
    time: float
    survival: float

    @property
    def rate(self) -> float:
        """Reuses per unit of time."""
        return self.gain / self.time

    def joined(self, after: "_Stretch") -> "_Stretch":
        """Return the range of this stretch and the one after it."""
        return _Stretch(
            gain=self.gain + self.survival * after.gain,
            time=self.time + self.survival * after.time,
            survival=self.survival * after.survival,
        )


def _worth(hazard: list[float]) -> list[float]:
    """Return the best rate of reuse from each bucket on.

    From the last bucket to the first: the bucket's own stretch is joined with the stretch after it
    as long as that one has the higher rate.
    """
    edges = [2 ** (k / 2) for k in range(len(hazard) + 1)]
    widths = [end - start for start, end in pairwise(edges)]
    stretches: list[_Stretch] = []
    worth = []
    for width, h in zip(reversed(widths), reversed(hazard), strict=True):
        stretch = _Stretch(h, width * (1 - h / 2), 1 - h)
        while stretches and stretches[-1].rate * stretch.time > stretch.gain:
            stretch = stretch.joined(stretches.pop())
        stretches.append(stretch)
        worth.append(stretch.rate)
    return worth[::-1]
