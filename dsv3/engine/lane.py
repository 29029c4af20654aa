"""A data-parallel group as rank 0 sees it: its pages, its cached prefixes, its line of requests.

A request goes to the group that has its first token soonest: cached prefixes and lines both count.
What still waits where others have room goes over to them.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ordered

from dsv3.cache.eviction import make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.pool import CachePool
from dsv3.cache.prefix import PrefixTree
from dsv3.cache.tiers import Moves, Tiers
from dsv3.engine.config import EngineConfig
from dsv3.engine.scheduler import Scheduler
from dsv3.engine.sequence import Sequence
from dsv3.observe.metrics import Metrics


class Lane:
    """What one group holds and does; the groups share nothing but the steps.

    Args:
        cache: the cache of any rank, for its geometry and size.
        settings: limits of a step.
        tiers: what is kept of the group's cache outside the device; None keeps nothing.
        metrics: shared by all groups.
    """

    def __init__(
        self, cache: CachePool, settings: EngineConfig, tiers: Tiers | None, metrics: Metrics
    ) -> None:
        self.pages, self.tiers = PageAllocator(cache.num_pages), tiers
        self.num_pinned = 0
        self.tree: PrefixTree | None = None
        if settings.prefix_reuse:
            policy = make_policy(settings.eviction, self.pages.num_pages)
            on_evict = None if tiers is None else tiers.offload
            page_size = cache.layout.page_size
            self.tree = PrefixTree(self.pages, page_size, policy, on_evict=on_evict)
        self.scheduler = Scheduler(
            cache.layout,
            self.pages,
            self.tree,
            tiers,
            settings.max_batch_tokens,
            settings.max_running,
            metrics,
        )

    @property
    def num_usable(self) -> int:
        """Pages that are not pinned."""
        return self.pages.num_pages - self.num_pinned

    def pin(self, prompts: list[list[int]]) -> int:
        """Keep cached prompts for good; return their tokens."""
        assert self.tree is not None, "nothing is cached"
        total = sum(self.tree.pin(ids) for ids in prompts)
        self.num_pinned = self.tree.num_pinned
        return total

    def save(self) -> Iterator[Moves]:
        """Write what is cached to disk, if there is one; yields what must move, plan by plan."""
        if self.tiers is not None and self.tree is not None:
            yield from self.tiers.save(self.tree)


def choose_lane(lanes: Ordered[Lane], seq: Sequence) -> int:
    """Return the group in which a new sequence is computed soonest; of equals the emptiest."""
    if len(lanes) == 1:
        return 0
    costs = [
        (lane.scheduler.load - lane.scheduler.num_cached(seq), -lane.pages.num_free)
        for lane in lanes
    ]
    return costs.index(min(costs))


def balance(lanes: Ordered[Lane]) -> None:
    """Let groups that could run more have what waits in the longest lines; after a step is planned.

    Not before: a sequence that lost its pages may have a token in flight, on its old group's ranks.
    """
    if len(lanes) == 1:
        return
    for index, lane in enumerate(lanes):
        line = lane.scheduler.waiting
        while lane.scheduler.num_spare > 0:
            longest = max(lanes, key=lambda other: len(other.scheduler.waiting))
            if len(longest.scheduler.waiting) <= len(line):
                break
            seq = longest.scheduler.hand_over()
            seq.lane = index
            lane.scheduler.add(seq)


def report(lanes: Ordered[Lane], metrics: Metrics) -> None:
    """Write down how things are, all groups together."""
    m = metrics
    m.waiting = sum(len(lane.scheduler.waiting) for lane in lanes)
    m.running = sum(len(lane.scheduler.running) for lane in lanes)
    m.pages_free = sum(lane.pages.num_free for lane in lanes)
    m.pages_idle = sum(lane.pages.num_idle for lane in lanes)
    m.pages_used = sum(lane.pages.num_pages for lane in lanes) - m.pages_free - m.pages_idle
    m.pages_pinned = sum(lane.num_pinned for lane in lanes)
    m.evictions = sum(lane.tree.num_evicted for lane in lanes if lane.tree is not None)
    moved = [lane.tiers.counts() for lane in lanes if lane.tiers is not None]
    if moved:
        totals = [sum(counts) for counts in zip(*moved, strict=True)]
        m.offloads, m.host_hits, m.disk_hits, m.disk_writes, m.disk_bytes = totals
