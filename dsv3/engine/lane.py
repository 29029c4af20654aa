"""A data-parallel group as rank 0 sees it: its pages, its cached prefixes, its line of requests.

A request goes to the group where little of it must be computed and little comes before it. What
waits in a group that is full goes over to one that has room.
"""

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Ordered

from dsv3.cache.eviction import make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.pool import CachePool
from dsv3.cache.prefix import PrefixTree
from dsv3.cache.tiers import Moves, PageKey, Tiers, extend_keys
from dsv3.config import ModelConfig
from dsv3.engine.metrics import Metrics
from dsv3.engine.scheduler import Scheduler
from dsv3.engine.sequence import Sequence
from dsv3.settings import EngineConfig

# What a group computes itself counts so often, against what comes before it: an idle group could
# begin at once with a prefix that another one is computing, but that would be work done twice.
_COMPUTED_TWICE = 2


class Lane:
    """What one group holds and does; the groups share nothing but the steps.

    Args:
        config: the model.
        cache: the cache of any rank, for its geometry and size.
        settings: limits of a step.
        tiers: what is kept of the group's cache outside the device; None keeps nothing.
        metrics: shared by all groups.
        is_only: there is no other group.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: CachePool,
        settings: EngineConfig,
        tiers: Tiers | None,
        metrics: Metrics,
        is_only: bool,
    ) -> None:
        self.pages, self.tiers = PageAllocator(cache.num_pages), tiers
        self._page_size, self._is_only = cache.layout.page_size, is_only
        self.num_pinned = 0
        # Prefixes of unfinished requests, by their full pages: cached soon, if not yet.
        self._coming: Counter[PageKey] = Counter()
        self.tree: PrefixTree | None = None
        if settings.prefix_reuse:
            depth_cost = self._page_size * config.attention_share
            policy = make_policy(settings.eviction, self.pages.num_pages, depth_cost)
            on_evict = None if tiers is None else tiers.offload
            self.tree = PrefixTree(self.pages, self._page_size, policy, on_evict=on_evict)
        self.scheduler = Scheduler(
            cache.layout,
            self.pages,
            self.tree,
            tiers,
            settings.max_batch_tokens,
            settings.max_running,
            metrics,
        )

    def add(self, seq: Sequence) -> None:
        """Put a sequence in line."""
        seq.burden = self._num_missing(seq)
        self._coming.update(self._keys(seq))
        self.scheduler.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that is done or cancelled; its computed prefix stays cached."""
        self._uncount(seq)
        self.scheduler.remove(seq)

    def hand_over(self) -> Sequence:
        """Return the last sequence in line, which is no longer in this one."""
        seq = self.scheduler.hand_over()
        self._uncount(seq)
        return seq

    def cost(self, seq: Sequence) -> tuple[int, int]:
        """Return what speaks against this group for a new sequence, in tokens; then in pages."""
        cost = self.scheduler.load + _COMPUTED_TWICE * self._num_missing(seq)
        return cost, -self.pages.num_free

    def _num_missing(self, seq: Sequence) -> int:
        """Return how much of a prompt is neither cached nor soon to be."""
        if self._is_only:
            return seq.prompt_len
        keys = self._keys(seq)
        num_coming = next((i for i, key in enumerate(keys) if key not in self._coming), len(keys))
        known = min(num_coming * self._page_size, seq.reuse_limit)
        return seq.prompt_len - max(known, self.scheduler.num_cached(seq))

    def _keys(self, seq: Sequence) -> list[PageKey]:
        """Return the names of the full pages of a sequence's prompt, where they matter."""
        if self.tree is None or self._is_only:
            return []
        num_full = seq.prompt_len // self._page_size
        extend_keys(seq.page_keys, seq.token_ids, num_full, self._page_size)
        return seq.page_keys[:num_full]

    def _uncount(self, seq: Sequence) -> None:
        for key in self._keys(seq):
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

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
    """Return the group for a new sequence."""
    if len(lanes) == 1:
        return 0
    costs = [lane.cost(seq) for lane in lanes]
    return costs.index(min(costs))


def balance(lanes: Ordered[Lane]) -> None:
    """Let groups that could run more have what waits in full ones; after a step is planned.

    Not before: a sequence that lost its pages may have a token in flight, on its old group's ranks.
    """
    full = [lane for lane in lanes if lane.scheduler.is_full]
    for index, lane in enumerate(lanes if full else ()):
        while lane.scheduler.num_spare > 0:
            longest = max(full, key=lambda other: len(other.scheduler.waiting))
            if len(longest.scheduler.waiting) <= len(lane.scheduler.waiting):
                break
            seq = longest.hand_over()
            seq.lane = index
            lane.add(seq)


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
