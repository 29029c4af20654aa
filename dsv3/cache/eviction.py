"""Which cached page goes first when room is needed.

The prefix tree tells a policy what happens to its pages and offers it those that may go: leaves
that nobody holds. The policy orders them. Time is logical unless the tree was given a clock.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heapify, heappop, heappush


class CacheEntry:
    """What policies know about a cached page.

    Attributes:
        depth: its index in the prefix, in pages: 0 for the first page.
        last_use: time of its last reuse, of its insertion before that.
        num_hits: how often it was reused.
        ticket: identifies its latest offer; 0 while it is not on offer.
    """

    __slots__ = ("depth", "last_use", "num_hits", "ticket")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.last_use = 0.0
        self.num_hits = 0
        self.ticket = 0


class EvictionPolicy(ABC):
    """Orders the pages on offer by a priority that is computed when they are offered.

    A heap with stale rows: a row counts only while its ticket is its entry's latest one, and
    stale rows are swept out when they are the majority. O(log n) amortized per offer.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, CacheEntry]] = []
        self._last_ticket = 0
        self._num_offered = 0

    @abstractmethod
    def priority(self, entry: CacheEntry) -> float:
        """Rate a page on offer; the lowest goes first."""

    def inserted(self, entry: CacheEntry, now: float) -> None:
        """Note a new page."""
        entry.last_use = now

    def hit(self, path: Sequence[CacheEntry], now: float) -> None:
        """Note that a request reuses these pages, given from the root down."""
        for entry in path:
            entry.last_use = now
            entry.num_hits += 1

    def replaced(self, old: CacheEntry, new: CacheEntry) -> None:
        """Note that a page which continues `old` takes its place."""
        new.num_hits = old.num_hits

    def offer(self, entry: CacheEntry) -> None:
        """Put a page on offer, or rate it afresh."""
        if entry.ticket == 0:
            self._num_offered += 1
        self._last_ticket += 1
        entry.ticket = self._last_ticket
        heappush(self._heap, (self.priority(entry), entry.ticket, entry))
        if len(self._heap) > 2 * self._num_offered + 64:
            self._heap = [row for row in self._heap if row[1] == row[2].ticket]
            heapify(self._heap)

    def withdraw(self, entry: CacheEntry) -> None:
        """Take a page off the offer."""
        if entry.ticket:
            entry.ticket = 0
            self._num_offered -= 1

    def take(self) -> CacheEntry:
        """Choose among the pages on offer, and withdraw the chosen one."""
        while True:
            _, ticket, entry = heappop(self._heap)
            if ticket == entry.ticket:
                self.withdraw(entry)
                return entry


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts what was not used for the longest time, the end of a prefix before its beginning."""

    def priority(self, entry: CacheEntry) -> float:
        """Return the time of the last use."""
        return entry.last_use


POLICIES = {"lru": LeastRecentlyUsed}


def make_policy(name: str) -> EvictionPolicy:
    """Return a fresh policy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"eviction policy {name!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[name]()
