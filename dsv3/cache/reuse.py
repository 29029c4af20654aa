"""How soon a cached page will be used again, learned from how soon pages like it were.

Ages are integers in the cache's own time and fall into buckets of half an octave: bucket k holds
the ages from sqrt(2)^k up to sqrt(2)^(k + 1).
"""

from itertools import pairwise
from math import isqrt

# What is known before anything is seen: of the pages that reach a bucket the same small share is
# reused in it, so that the rate of reuse falls as 1 / age and the oldest page is worth least.
_PRIOR_HAZARD = 0.05
# The prior, or the parent curve, counts for so many observations.
_PRIOR_WEIGHT = 20.0
# A curve that has seen so many lives counts each of them half from then on, and forgets in time.
_MEMORY = 4096.0


def age_bucket(age: int) -> int:
    """Return the bucket of an age >= 1."""
    return (age * age).bit_length() - 1


def bucket_start(bucket: int) -> int:
    """Return the lowest age in a bucket, or above it if it holds no integer."""
    return isqrt((1 << bucket) - 1) + 1


class ReuseCurve:
    """What became of one kind of pages, and what a page of this kind is worth at every age.

    A life begins when a page is used and ends when it is used again. The worth at age a is the best
    rate, in reuses per unit of time held, that any plan "hold it until its reuse or age b" has from
    there on: max over b of P(reused before b) / E(time held until then), a Gittins index. So a page
    whose time is likely to come soon can be worth more than one that was used just now.

    Args:
        num_buckets: buckets of age; older pages count as in the last one.
        parent: curve of a kind that this one resembles until it has seen enough: reuses come when
            they come there, and their number is scaled to what was seen here.

    Attributes:
        worth: by bucket of age.
    """

    __slots__ = ("_due", "_hazard", "_num_seen", "_parent", "_reused", "_survived", "worth")

    def __init__(self, num_buckets: int, parent: "ReuseCurve | None" = None) -> None:
        self._parent = parent
        self._reused = [0.0] * num_buckets
        self._survived = [0.0] * num_buckets
        self._num_seen = self._due = 0.0
        self._hazard = [_PRIOR_HAZARD] * num_buckets
        self.refresh()

    def observe(self, bucket: int, *, reused: bool) -> None:
        """Note that a page was reused at an age of this bucket, or grew older unused."""
        (self._reused if reused else self._survived)[bucket] += 1
        self._num_seen += 1
        # An eighth of what was seen is new: drawing the curve costs next to nothing per event.
        if self._num_seen >= self._due:
            self.refresh()

    def refresh(self) -> None:
        """Draw the curve from what was seen so far."""
        if self._survived[0] + self._reused[0] > _MEMORY:
            self._reused = [count / 2 for count in self._reused]
            self._survived = [count / 2 for count in self._survived]
            self._num_seen /= 2
        self._due = self._num_seen * 9 / 8 + 1
        self._hazard = self._estimate()
        self.worth = _worth(self._hazard)

    def _estimate(self) -> list[float]:
        """Return by bucket which share of the pages that reach it is reused in it."""
        flat = [_PRIOR_HAZARD] * len(self._hazard)
        likeness = flat if self._parent is None else self._parent._hazard
        seen = [r + s for r, s in zip(self._reused, self._survived, strict=True)]
        expected = sum(n * h for n, h in zip(seen, likeness, strict=True))
        scale = (sum(self._reused) + _PRIOR_WEIGHT) / (expected + _PRIOR_WEIGHT)
        hazard = []
        for k, h in enumerate(likeness):
            # Neighbouring buckets are pooled: the truth is smooth, the counts are small.
            near = slice(max(0, k - 1), k + 2)
            prior = _PRIOR_WEIGHT * min(0.9, scale * h)
            hazard.append((sum(self._reused[near]) + prior) / (sum(seen[near]) + _PRIOR_WEIGHT))
        return hazard


def _worth(hazard: list[float]) -> list[float]:
    """Return the best rate of reuse from each bucket on.

    From the last bucket to the first: what is gained and the time it takes in the bucket itself,
    joined with the stretch after it as long as that raises the rate.
    """
    edges = [2 ** (k / 2) for k in range(len(hazard) + 1)]
    widths = [end - start for start, end in pairwise(edges)]
    stretches: list[tuple[float, float, float, float]] = []
    worth = []
    for width, h in zip(reversed(widths), reversed(hazard), strict=True):
        gain, time, left = h, width * (1 - h / 2), 1 - h
        while stretches and stretches[-1][0] * time > gain:
            _, more_gain, more_time, more_left = stretches.pop()
            gain, time, left = gain + left * more_gain, time + left * more_time, left * more_left
        stretches.append((gain / time, gain, time, left))
        worth.append(gain / time)
    return worth[::-1]
