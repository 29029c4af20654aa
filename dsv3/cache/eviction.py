"""Eviction policies: choose the cached page to evict when pages are needed.

The prefix tree reports uses, insertions and removals of its pages to the policy, and offers idle
leaves as candidates. The policy rates the candidates and keeps them in a heap. Time is logical: it
advances with requests and inserted pages only.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dsv3.cache.reuse import ReuseCurve, age_bucket, bucket_start


class CacheEntry:
    """A cached page as seen by policies.

    Attributes:
        key: hash of the prefix that ends with this page; valid in this process only.
        depth: index in the prefix, in pages: 0 for the first page, -1 for the root.
        last_use: time of the latest reuse, or of the insertion.
        num_hits: number of reuses.
        visit: the latest request that used the page.
        rating: (worth, tie-breaker) when last rated; the page with the lowest is evicted first.
        heap_index: index in the heap of candidates; -1 while not a candidate.
    """

    __slots__ = ("depth", "heap_index", "key", "last_use", "num_hits", "rating", "visit")

    def __init__(self, parent: "CacheEntry | None", tokens: bytes) -> None:
        self.key: int = 0 if parent is None else hash((parent.key, tokens))
        self.depth: int = -1 if parent is None else parent.depth + 1
        self.last_use = 0
        self.num_hits = 0
        self.visit: _Visit | None = None
        self.rating = (0.0, 0)
        self.heap_index = -1


class EvictionPolicy(ABC):
    """Rates pages and keeps the candidates in a heap from which any of them can be withdrawn."""

    def __init__(self) -> None:
        self._heap: list[CacheEntry] = []
        self._now = 0

    @abstractmethod
    def rate(self, entry: CacheEntry) -> tuple[float, int]:
        """Return (worth, tie-breaker) of a page now; the lowest is evicted first."""

    @abstractmethod
    def hit(self, path: Sequence[CacheEntry], partial: CacheEntry | None = None) -> None:
        """Record a request that reuses pages.

        Args:
            path: reused nodes, from the root (included) on.
            partial: page of which the request copies the beginning.
        """

    @abstractmethod
    def inserted(self, entry: CacheEntry, parent: CacheEntry) -> None:
        """Record a new page."""

    @abstractmethod
    def replaced(self, old: CacheEntry, new: CacheEntry, parent: CacheEntry) -> None:
        """Record that `new`, a page with more tokens, replaces `old`."""

    def removed(self, entry: CacheEntry, *, evicted: bool) -> None:
        """Record that a page is removed from the tree, by eviction or because it is obsolete."""
        self.withdraw(entry)

    def offer(self, entry: CacheEntry) -> None:
        """Add a page to the candidates, or update its rating."""
        entry.rating = self.rate(entry)
        if entry.heap_index < 0:
            entry.heap_index = len(self._heap)
            self._heap.append(entry)
        self._sift(entry)

    def withdraw(self, entry: CacheEntry) -> None:
        """Remove a page from the candidates, if it is one of them."""
        if entry.heap_index < 0:
            return
        last = self._heap.pop()
        if last is not entry:
            last.heap_index = entry.heap_index
            self._sift(last)
        entry.heap_index = -1

    def take(self) -> CacheEntry:
        """Remove the candidate to evict and return it."""
        entry = self._heap[0]
        self.withdraw(entry)
        return entry

    def _sift(self, entry: CacheEntry) -> None:
        """Restore the heap's order after the rating at an entry's index has changed."""
        heap = self._heap
        index = entry.heap_index
        rating = entry.rating
        while index > 0:
            parent_index = (index - 1) // 2
            parent = heap[parent_index]
            if rating >= parent.rating:
                break
            heap[index] = parent
            parent.heap_index = index
            index = parent_index
        while (child_index := 2 * index + 1) < len(heap):
            right_index = child_index + 1
            if right_index < len(heap) and heap[right_index].rating < heap[child_index].rating:
                child_index = right_index
            child = heap[child_index]
            if rating <= child.rating:
                break
            heap[index] = child
            child.heap_index = index
            index = child_index
        heap[index] = entry
        entry.heap_index = index


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts the page with the oldest use, and the end of a prefix before its beginning."""

    def rate(self, entry: CacheEntry) -> tuple[float, int]:
        """Return the time of the last use."""
        return entry.last_use, 0

    def hit(self, path: Sequence[CacheEntry], partial: CacheEntry | None = None) -> None:
        """Set the reused pages' time of last use."""
        self._now += 1
        for entry in path:
            entry.last_use = self._now
        if partial is not None:
            partial.last_use = self._now

    def inserted(self, entry: CacheEntry, parent: CacheEntry) -> None:
        """Set the page's time of last use; all pages of a request get the same."""
        entry.last_use = max(self._now, parent.last_use)

    def replaced(self, old: CacheEntry, new: CacheEntry, parent: CacheEntry) -> None:
        """Treat the new page as inserted."""
        self.inserted(new, parent)


# The rank of a page: 0 if it was never reused, k if it was reused 2^(k - 1) times or more; _END if
# it is the last page of its latest request, because other requests rarely share that page.
_TOP_RANK = 7
_END = 8
_NUM_RANKS = 9
# A kind of page is rank * _SIZES + the bit length of the number of pages its request added.
_SIZES = 64


class _Visit:
    """A request that used pages.

    Attributes:
        time: of the request.
        num_new: pages it added that were neither cached nor recently evicted.
        end: the last page it used; None once that page is removed.
        unused_ranks: bit mask of the ranks of its pages that no later request has used yet.
    """

    __slots__ = ("end", "num_new", "time", "unused_ranks")

    def __init__(self, time: int) -> None:
        self.time = time
        self.num_new = 0
        self.end: CacheEntry | None = None
        self.unused_ranks = 0

    def extend(self, entry: CacheEntry) -> None:
        """Append a page."""
        if self.end is not None and self.end.depth >= 0:
            self.unused_ranks |= 1 << _reuse_rank(self.end)
        self.unused_ranks |= 1 << _END
        self.end = entry
        entry.visit = self


def _reuse_rank(entry: CacheEntry) -> int:
    return min(entry.num_hits.bit_length(), _TOP_RANK)


def _rank(entry: CacheEntry) -> int:
    assert entry.visit is not None
    return _END if entry.visit.end is entry else _reuse_rank(entry)


class _Ghost(NamedTuple):
    """An evicted page: the visit that used it last, its rank then, and its number of reuses."""

    visit: _Visit
    rank: int
    num_hits: int


class CostAware(EvictionPolicy):
    """Evicts the page of least worth: expected reuse rate times the cost of recomputing it.

    Pages are classified by their number of reuses (the rank) and by the number of new pages of
    their latest request: a dialogue's next turn adds few pages and is likely to be continued, a
    long prompt that is seen once adds many. For each such kind a `ReuseCurve` learns at which ages
    pages are reused. So the worth of a kind is measured, not assumed, and prefixes that will be
    reused win against scans under any traffic. Evicted pages are remembered for a while (ghosts);
    otherwise the policy would learn only about the pages that it kept.

    Args:
        num_pages: pages of the cache.
        depth_cost: cost of recomputing a page, per page before it, relative to the first page's.
    """

    def __init__(self, num_pages: int, depth_cost: float = 0.0) -> None:
        super().__init__()
        self._depth_cost = depth_cost
        # Evicted pages by their keys; four times the cache's size.
        self._ghosts: dict[int, _Ghost] = {}
        self._max_ghosts = max(1 << 14, 4 * num_pages)
        num_buckets = age_bucket(2 * (num_pages + self._max_ghosts)) + 1
        self._last_bucket = num_buckets - 1
        # Visits by the bucket of their age, oldest first; dropped when older than the last bucket.
        self._visits: list[deque[_Visit]] = [deque() for _ in range(num_buckets)]
        self._max_ages = [bucket_start(k + 1) for k in range(num_buckets)]
        # The prior of each rank's curve is the curve of the rank below it.
        self._rank_curves = [ReuseCurve(num_buckets)]
        for _ in range(_TOP_RANK):
            self._rank_curves.append(ReuseCurve(num_buckets, self._rank_curves[-1]))
        self._rank_curves.append(ReuseCurve(num_buckets))
        self._kind_curves: dict[int, ReuseCurve] = {}
        self._next_to_rate = 0

    def rate(self, entry: CacheEntry) -> tuple[float, int]:
        """Return the page's worth, and the time of its last use as the tie-breaker."""
        visit = entry.visit
        assert visit is not None
        # `age_bucket` and `_curve` are inlined: this runs several times for every evicted page.
        kind = _rank(entry) * _SIZES + visit.num_new.bit_length()
        curve = self._kind_curves.get(kind) or self._curve(kind)
        age = self._now - visit.time + 1
        bucket = (age * age).bit_length() - 1
        worth = curve.worth[bucket] if bucket <= self._last_bucket else curve.worth[-1]
        return worth * (1 + self._depth_cost * entry.depth), visit.time

    def hit(self, path: Sequence[CacheEntry], partial: CacheEntry | None = None) -> None:
        """Begin a visit with the reused pages."""
        visit = self._begin_visit()
        used = path[1:] if partial is None else [*path[1:], partial]
        for entry in used:
            assert entry.visit is not None
            self._reused(entry.visit, _rank(entry))
        for entry in used:
            entry.num_hits += 1
        if partial is not None:
            partial.visit = visit
            visit.unused_ranks |= 1 << _reuse_rank(partial)
        root = path[0]
        visit.end = root
        root.visit = visit
        for entry in path[1:]:
            visit.extend(entry)

    def inserted(self, entry: CacheEntry, parent: CacheEntry) -> None:
        """Add the page to the visit that ends with its parent, or begin a visit."""
        visit = parent.visit
        if visit is None or visit.end is not parent:
            visit = self._begin_visit()
        self._now += 1
        ghost = self._ghosts.pop(entry.key, None)
        if ghost is None:
            visit.num_new += 1
        else:
            self._reused(ghost.visit, ghost.rank)
            entry.num_hits = ghost.num_hits + 1
        visit.extend(entry)

    def replaced(self, old: CacheEntry, new: CacheEntry, parent: CacheEntry) -> None:
        """Inherit hits and visit from the replaced page."""
        visit = old.visit
        new.visit = visit
        new.num_hits = old.num_hits
        if visit is not None and visit.end is old:
            visit.end = new
        elif visit is not None and visit.end is parent:
            visit.extend(new)

    def removed(self, entry: CacheEntry, *, evicted: bool) -> None:
        """Withdraw the page; an evicted page becomes a ghost."""
        super().removed(entry, evicted=evicted)
        visit = entry.visit
        assert visit is not None
        if evicted:
            self._ghosts[entry.key] = _Ghost(visit, _rank(entry), entry.num_hits)
            if len(self._ghosts) > self._max_ghosts:
                del self._ghosts[next(iter(self._ghosts))]
        if visit.end is entry:
            visit.end = None

    def take(self) -> CacheEntry:
        """Remove the candidate to evict and return it.

        Worth changes with age, so each call first updates the ratings of the next four entries of
        the heap, in turn.
        """
        for _ in range(4):
            self._next_to_rate = (self._next_to_rate + 1) % len(self._heap)
            self.offer(self._heap[self._next_to_rate])
        return super().take()

    def _curve(self, kind: int) -> ReuseCurve:
        """Return the curve of a kind of pages; see `_SIZES`."""
        curve = self._kind_curves.get(kind)
        if curve is None:
            curve = ReuseCurve(len(self._visits), parent=self._rank_curves[kind // _SIZES])
            self._kind_curves[kind] = curve
        return curve

    def _observe(self, visit: _Visit, rank: int, bucket: int, *, reused: bool) -> None:
        self._rank_curves[rank].observe(bucket, reused=reused)
        kind = rank * _SIZES + visit.num_new.bit_length()
        self._curve(kind).observe(bucket, reused=reused)

    def _reused(self, visit: _Visit, rank: int) -> None:
        """Learn from a reuse of a page that `visit` used last.

        Each rank of a visit counts once: a request usually reuses many of its pages together.
        """
        if visit.unused_ranks >> rank & 1:
            visit.unused_ranks ^= 1 << rank
            bucket = min(age_bucket(self._now - visit.time + 1), self._last_bucket)
            self._observe(visit, rank, bucket, reused=True)

    def _begin_visit(self) -> _Visit:
        """Begin a visit; learn from older ones that have left their bucket of age unused."""
        self._now += 1
        for bucket, visits in enumerate(self._visits):
            latest_time = self._now + 1 - self._max_ages[bucket]
            while visits and visits[0].time <= latest_time:
                visit = visits.popleft()
                for rank in range(_NUM_RANKS):
                    if visit.unused_ranks >> rank & 1:
                        self._observe(visit, rank, bucket, reused=False)
                if visit.unused_ranks and bucket + 1 < len(self._visits):
                    self._visits[bucket + 1].append(visit)
        visit = _Visit(self._now)
        self._visits[0].append(visit)
        return visit


POLICIES = ("cost", "lru")


def make_policy(name: str, num_pages: int, depth_cost: float = 0.0) -> EvictionPolicy:
    """Return a new policy, one of `POLICIES`; see `CostAware` for the arguments.

    Raises:
        ValueError: unknown name.
    """
    if name not in POLICIES:
        raise ValueError(f"eviction policy {name!r} is not one of {', '.join(POLICIES)}")
    return LeastRecentlyUsed() if name == "lru" else CostAware(num_pages, depth_cost)
