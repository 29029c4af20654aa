"""Which cached page goes first when room is needed.

The prefix tree tells a policy what happens to its pages and puts those on offer that may go:
leaves that nobody holds. The policy rates them and keeps them in a heap. Its time is logical: it
passes as pages and requests come in, and stands still while none do.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from dsv3.cache.reuse import ReuseCurve, age_bucket, bucket_start


class CacheEntry:
    """What policies know about a cached page.

    Attributes:
        key: names the prefix that ends with this page, in this process.
        depth: its index in the prefix, in pages: 0 for the first page, -1 for the root.
        last_use: time of its latest reuse, or of its insertion.
        num_hits: how often it was reused.
        visit: the latest request that used it.
        rating: the lower, the sooner it goes; as of when it was last rated.
        slot: its place in the heap; -1 while it is not on offer.
    """

    __slots__ = ("depth", "key", "last_use", "num_hits", "rating", "slot", "visit")

    def __init__(self, parent: "CacheEntry | None", tokens: bytes) -> None:
        self.key: int = 0 if parent is None else hash((parent.key, tokens))
        self.depth: int = -1 if parent is None else parent.depth + 1
        self.last_use = 0
        self.num_hits = 0
        self.visit: _Visit | None = None
        self.rating = (0.0, 0)
        self.slot = -1


class EvictionPolicy(ABC):
    """Rates pages and chooses among those on offer: a heap that knows where its entries are."""

    def __init__(self) -> None:
        self._heap: list[CacheEntry] = []
        self._now = 0

    @abstractmethod
    def rate(self, entry: CacheEntry) -> tuple[float, int]:
        """Rate a page as of now; the lowest goes first."""

    @abstractmethod
    def hit(self, path: Sequence[CacheEntry], partial: CacheEntry | None = None) -> None:
        """Note a request that reuses a path from the root (included) on, and part of a page."""

    @abstractmethod
    def inserted(self, entry: CacheEntry, parent: CacheEntry) -> None:
        """Note a new page."""

    @abstractmethod
    def replaced(self, old: CacheEntry, new: CacheEntry, parent: CacheEntry) -> None:
        """Note that a page with more tokens takes the place of `old`."""

    def removed(self, entry: CacheEntry, *, evicted: bool) -> None:
        """Note that a page leaves the tree: evicted, or because nobody will ask for it again."""
        self.withdraw(entry)

    def offer(self, entry: CacheEntry) -> None:
        """Put a page on offer, or rate it afresh."""
        entry.rating = self.rate(entry)
        if entry.slot < 0:
            entry.slot = len(self._heap)
            self._heap.append(entry)
        self._sift(entry)

    def withdraw(self, entry: CacheEntry) -> None:
        """Take a page off the offer, if it is on it."""
        if entry.slot < 0:
            return
        slot, last = entry.slot, self._heap.pop()
        entry.slot = -1
        if last is not entry:
            last.slot = slot
            self._sift(last)

    def take(self) -> CacheEntry:
        """Choose among the pages on offer, and withdraw the chosen one."""
        entry = self._heap[0]
        self.withdraw(entry)
        return entry

    def _sift(self, entry: CacheEntry) -> None:
        """Move an entry from its slot up or down to where its rating belongs."""
        heap, slot, rating = self._heap, entry.slot, entry.rating
        while slot and rating < (above := heap[(slot - 1) // 2]).rating:
            heap[slot], above.slot, slot = above, slot, (slot - 1) // 2
        while (child := 2 * slot + 1) < len(heap):
            if child + 1 < len(heap) and heap[child + 1].rating < heap[child].rating:
                child += 1
            below = heap[child]
            if rating <= below.rating:
                break
            heap[slot], below.slot, slot = below, slot, child
        heap[slot], entry.slot = entry, slot


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts what was not used for the longest time, the end of a prefix before its beginning."""

    def rate(self, entry: CacheEntry) -> tuple[float, int]:
        """Return the time of the last use."""
        return entry.last_use, 0

    def hit(self, path: Sequence[CacheEntry], partial: CacheEntry | None = None) -> None:
        """Note the use."""
        self._now += 1
        for entry in path if partial is None else (*path, partial):
            entry.last_use = self._now

    def inserted(self, entry: CacheEntry, parent: CacheEntry) -> None:
        """Note the time; pages of one request have the same."""
        entry.last_use = max(self._now, parent.last_use)

    def replaced(self, old: CacheEntry, new: CacheEntry, parent: CacheEntry) -> None:
        """Note the time."""
        self.inserted(new, parent)


# The rank of a page: 0 if it was never reused, k if it was 2^(k - 1) times or more; _END if its
# latest request ends there, for where a request ends is mostly the concern of no other one.
_TOP_RANK = 7
_END = 8
# A kind of page is rank * _SIZES + the bit length of the number of pages its request added.
_SIZES = 64
_RANKS_IN = [[rank for rank in range(_END + 1) if mask >> rank & 1] for mask in range(2 << _END)]


class _Visit:
    """A request, as its pages remember it.

    Attributes:
        time: when it came.
        num_new: pages it added that were not known before.
        end: the page it reached, if that is still in the tree.
        waiting: ranks of its pages that no later request has used yet, one bit each.
    """

    __slots__ = ("end", "num_new", "time", "waiting")

    def __init__(self, time: int) -> None:
        self.time = time
        self.num_new = 0
        self.end: CacheEntry | None = None
        self.waiting = 0

    def extend(self, entry: CacheEntry) -> None:
        """Go on to the next page."""
        if self.end is not None and self.end.depth >= 0:
            self.waiting |= 1 << _reuse_rank(self.end)
        self.waiting |= 1 << _END
        self.end, entry.visit = entry, self


def _reuse_rank(entry: CacheEntry) -> int:
    return min(entry.num_hits.bit_length(), _TOP_RANK)


def _rank(entry: CacheEntry) -> int:
    assert entry.visit is not None
    return _END if entry.visit.end is entry else _reuse_rank(entry)


class CostAware(EvictionPolicy):
    """Evicts the page that is worth least: by what it would cost and by when it will be wanted.

    Pages are told apart by how often they were reused (their rank) and by how many new pages their
    latest request brought along: a follow-up to a dialogue brings few and is likely to be followed
    up in turn, a long prompt that is seen once brings many. For each such kind a `ReuseCurve`
    learns at what age pages are reused, so what a kind is worth is not assumed but seen, and scans
    lose against prefixes with a future whatever the traffic looks like. Pages that were evicted are
    remembered for a while, or the policy would only ever learn about those it had kept.

    Args:
        num_pages: pages of the cache.
        depth_cost: cost of recomputing a page, per page before it, relative to the first page's.
    """

    def __init__(self, num_pages: int, depth_cost: float = 0.0) -> None:
        super().__init__()
        self._depth_cost = depth_cost
        # Evicted pages: the visit that used them last, their rank, and how often they were reused.
        # Four caches full of them show what would have come of keeping more.
        self._ghosts: dict[int, tuple[_Visit, int, int]] = {}
        self._max_ghosts = max(1 << 14, 4 * num_pages)
        num_buckets = age_bucket(2 * (num_pages + self._max_ghosts)) + 1
        self._last_bucket = num_buckets - 1
        # Visits by age, oldest first, until they outgrow the last bucket.
        self._visits: list[deque[_Visit]] = [deque() for _ in range(num_buckets)]
        self._outgrown = [bucket_start(k + 1) for k in range(num_buckets)]
        # Each rank resembles the one below it.
        self._of_rank = [ReuseCurve(num_buckets)]
        for _ in range(_TOP_RANK):
            self._of_rank.append(ReuseCurve(num_buckets, self._of_rank[-1]))
        self._of_rank.append(ReuseCurve(num_buckets))
        self._of_kind: dict[int, ReuseCurve] = {}
        self._hand = 0

    def rate(self, entry: CacheEntry) -> tuple[float, int]:
        """Return the page's worth, and its time to settle ties."""
        visit = entry.visit
        assert visit is not None
        # Written out: it runs several times for every page that goes.
        kind = _rank(entry) * _SIZES + visit.num_new.bit_length()
        curve = self._of_kind.get(kind) or self._curve(kind)
        age = self._now - visit.time + 1
        bucket = (age * age).bit_length() - 1
        worth = curve.worth[bucket] if bucket <= self._last_bucket else curve.worth[-1]
        return worth * (1 + self._depth_cost * entry.depth), visit.time

    def hit(self, path: Sequence[CacheEntry], partial: CacheEntry | None = None) -> None:
        """Open a visit with the reused pages."""
        visit = self._open()
        used = path[1:] if partial is None else [*path[1:], partial]
        for entry in used:
            assert entry.visit is not None
            self._reused(entry.visit, _rank(entry))
        for entry in used:
            entry.num_hits += 1
        if partial is not None:
            partial.visit = visit
            visit.waiting |= 1 << _reuse_rank(partial)
        visit.end, path[0].visit = path[0], visit
        for entry in path[1:]:
            visit.extend(entry)

    def inserted(self, entry: CacheEntry, parent: CacheEntry) -> None:
        """Let the page belong to the visit that ends with its parent, or open a visit."""
        visit = parent.visit
        if visit is None or visit.end is not parent:
            visit = self._open()
        self._now += 1
        ghost = self._ghosts.pop(entry.key, None)
        if ghost is None:
            visit.num_new += 1
        else:
            earlier, rank, num_hits = ghost
            self._reused(earlier, rank)
            entry.num_hits = num_hits + 1
        visit.extend(entry)

    def replaced(self, old: CacheEntry, new: CacheEntry, parent: CacheEntry) -> None:
        """Let the page follow in the other's footsteps."""
        visit = new.visit = old.visit
        new.num_hits = old.num_hits
        if visit is not None and visit.end is old:
            visit.end = new
        elif visit is not None and visit.end is parent:
            visit.extend(new)

    def removed(self, entry: CacheEntry, *, evicted: bool) -> None:
        """Let go of a page, and remember it if it may be asked for again."""
        super().removed(entry, evicted=evicted)
        visit = entry.visit
        assert visit is not None
        if evicted:
            self._ghosts[entry.key] = visit, _rank(entry), entry.num_hits
            if len(self._ghosts) > self._max_ghosts:
                del self._ghosts[next(iter(self._ghosts))]
        if visit.end is entry:
            visit.end = None

    def take(self) -> CacheEntry:
        """Rate some pages afresh, going round, as their worth changes with age; then choose."""
        for _ in range(4):
            self._hand = (self._hand + 1) % len(self._heap)
            self.offer(self._heap[self._hand])
        return super().take()

    def _curve(self, kind: int) -> ReuseCurve:
        """Return the curve of a kind: its rank and the bit length of its visit's new pages."""
        curve = self._of_kind.get(kind)
        if curve is None:
            parent = self._of_rank[kind // _SIZES]
            curve = self._of_kind[kind] = ReuseCurve(len(self._visits), parent)
        return curve

    def _observe(self, visit: _Visit, rank: int, bucket: int, *, reused: bool) -> None:
        self._of_rank[rank].observe(bucket, reused=reused)
        kind = rank * _SIZES + visit.num_new.bit_length()
        self._curve(kind).observe(bucket, reused=reused)

    def _reused(self, visit: _Visit, rank: int) -> None:
        """Learn from a reuse; of the many pages that a visit reuses together, the first counts."""
        if visit.waiting >> rank & 1:
            visit.waiting ^= 1 << rank
            bucket = min(age_bucket(self._now - visit.time + 1), self._last_bucket)
            self._observe(visit, rank, bucket, reused=True)

    def _open(self) -> _Visit:
        """Begin a visit; learn from those that have come of age unused since the last one."""
        self._now += 1
        for bucket, visits in enumerate(self._visits):
            youngest = self._now + 1 - self._outgrown[bucket]
            while visits and visits[0].time <= youngest:
                visit = visits.popleft()
                for rank in _RANKS_IN[visit.waiting]:
                    self._observe(visit, rank, bucket, reused=False)
                if visit.waiting and bucket + 1 < len(self._visits):
                    self._visits[bucket + 1].append(visit)
        visit = _Visit(self._now)
        self._visits[0].append(visit)
        return visit


POLICIES = ("cost", "lru")


def make_policy(name: str, num_pages: int, depth_cost: float = 0.0) -> EvictionPolicy:
    """Return a fresh policy of that name; see `CostAware` for the arguments.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"eviction policy {name!r} is not one of {', '.join(POLICIES)}")
    return LeastRecentlyUsed() if name == "lru" else CostAware(num_pages, depth_cost)
