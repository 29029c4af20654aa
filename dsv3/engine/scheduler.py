"""Which tokens run in the next step. Rank 0 only; plain numbers, no tensors.

Every step takes one token of each sequence that is generating, then fills the token budget with
prompt chunks, then admits waiting requests. Pages are taken as sequences grow. When none is left,
idle cached ones are evicted; after those, the running request that came last gives up its pages
and resumes later, from whatever of its prefix is still cached.
"""

import time
from array import array
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, PrefixTree
from dsv3.cache.tiers import Moves, Tiers, extend_keys
from dsv3.engine.admission import Admission
from dsv3.engine.metrics import Metrics
from dsv3.engine.sequence import Sequence

# A request waits so many seconds at most, all in all, for its prefix to come from disk.
_DISK_PATIENCE = 10.0
# A sequence burdens its group as much as so many prompt tokens: with a token in many steps to come.
_SEQUENCE_LOAD = 64


@dataclass
class Step:
    """What the next step computes: (sequence, new tokens), ordered as `StepPlan` demands.

    Attributes:
        copies: pages to copy first, (from, to): partial pages that are continued.
        moves: pages to move between the cache's tiers.
    """

    chosen: list[tuple[Sequence, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)


class Scheduler:
    """Waiting and running sequences, and the pages they hold.

    Args:
        layout: geometry of the pages.
        pages: the allocator.
        tree: cached prefixes; None reuses nothing.
        tiers: prefixes kept outside the device; None keeps none.
        max_batch_tokens: new tokens of a step.
        max_running: sequences in progress at a time.
        metrics: told of admissions, reuse and preemptions.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pages: PageAllocator,
        tree: PrefixTree | None,
        tiers: Tiers | None,
        max_batch_tokens: int,
        max_running: int,
        metrics: Metrics,
    ) -> None:
        self._layout, self._pages, self._tree, self._tiers = layout, pages, tree, tiers
        self._metrics = metrics
        self._max_batch_tokens, self._max_running = max_batch_tokens, max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._num_waiting_tokens = 0
        # Set when the best waiting request found no room; nothing changes until pages come free.
        self._is_full = False

    @property
    def load(self) -> int:
        """Tokens that go before those of a newcomer, and something for every sequence."""
        num_left = self._num_waiting_tokens + sum(seq.num_left for seq in self.running)
        return num_left + _SEQUENCE_LOAD * (len(self.waiting) + len(self.running))

    @property
    def is_full(self) -> bool:
        """Whether what waits is kept from running by what runs."""
        return self._is_full or len(self.running) >= self._max_running

    @property
    def num_spare(self) -> int:
        """Sequences that could run beyond those there are."""
        return self._max_running - len(self.running) - len(self.waiting)

    def num_cached(self, seq: Sequence) -> int:
        """Return how many leading tokens of a sequence need not be computed here."""
        return self._match(seq).num_tokens

    def add(self, seq: Sequence) -> None:
        """Put a sequence in line."""
        self._is_full = False
        self._num_waiting_tokens += seq.burden
        insort(self.waiting, seq, key=lambda s: s.order)

    def hand_over(self) -> Sequence:
        """Return the last sequence in line, which is no longer in this one."""
        seq = self.waiting.pop()
        self._num_waiting_tokens -= seq.burden
        return seq

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that is done or cancelled; its computed prefix stays cached."""
        seq.is_done = True
        self._is_full = False
        if not seq.is_running:
            self.waiting.remove(seq)
            self._num_waiting_tokens -= seq.burden
            return
        self._stop(seq)

    def forget(self, seq: Sequence) -> None:
        """Withdraw what a sequence has computed from reuse: its entries may not be finite.

        Within a step they spoil those of earlier positions too: a masked key weighs zero, and zero
        times NaN is NaN.
        """
        if self._tree is not None and seq.is_running:
            self._tree.forget(seq.token_ids[: seq.num_committed], seq.num_cached or 0)
        seq.num_committed = 0

    def _stop(self, seq: Sequence) -> None:
        """Take a running sequence's pages; its computed prefix stays cached."""
        self.register(seq)
        self.running.remove(seq)
        self._pages.release(seq.pages)
        seq.rewind()

    def register(self, seq: Sequence) -> None:
        """Offer a running sequence's computed prefix for reuse."""
        if self._tree is not None and seq.is_running:
            group = seq.request.conversation_id
            self._tree.insert(seq.token_ids, seq.num_committed, seq.pages, group=group)

    def schedule(self) -> Step:
        """Choose the next step's work; pages are allocated, `num_computed` is not yet advanced."""
        step = Step()
        budget = self._max_batch_tokens - sum(seq.num_left == 1 for seq in self.running)
        for seq in self._until_preempted():
            left = seq.num_left
            count = left if left <= 1 else min(left, budget)
            if count > 0 and self._grow(seq, count):
                step.chosen.append((seq, count))
                budget -= count if left > 1 else 0
        if self.waiting and len(self.running) < self._max_running and not self._is_full:
            self._admit(budget, step)
        step.chosen.sort(key=lambda work: (work[1], work[0].num_computed))
        if self._tiers is not None:
            step.moves = self._tiers.draw(is_idle=not step.chosen)
        return step

    def _until_preempted(self) -> Iterator[Sequence]:
        """Iterate over the running sequences, of which the last may go on the way."""
        i = 0
        while i < len(self.running):
            yield self.running[i]
            i += 1

    # Pages ------------------------------------------------------------------------------------

    def _make_room(self, num_pages: int) -> bool:
        if self._tree is not None:
            return self._tree.make_room(num_pages)
        return self._pages.num_free >= num_pages

    def _grow(self, seq: Sequence, count: int) -> bool:
        """Give a sequence the pages for `count` more tokens, at the cost of later ones."""
        missing = self._layout.pages_for(seq.num_computed + count) - len(seq.pages)
        if missing <= 0:
            return True
        while not self._make_room(missing):
            if self.running[-1] is seq:
                return False
            self._preempt(self.running[-1])
        seq.pages.extend(self._pages.allocate(missing))
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._metrics.preemptions += 1
        self._stop(seq)
        self.add(seq)

    # Admission --------------------------------------------------------------------------------

    def _admit(self, budget: int, step: Step) -> None:
        """Let waiting sequences join the running ones, as long as their prompts find room."""
        admission = Admission(
            self._match, self._is_coming, None if self._tree is None else self.running
        )
        while budget > 0 and len(self.running) < self._max_running:
            seq = admission.choose(self.waiting)
            if seq is None:
                return
            if not self._take(seq, step):
                self._is_full = True
                return
            admission.admitted(seq, self.waiting)
            self.waiting.remove(seq)
            self._num_waiting_tokens -= seq.burden
            insort(self.running, seq, key=lambda s: s.order)
            seq.is_running = True
            count = min(seq.num_left, budget)
            grown = self._grow(seq, count)
            assert grown, "room was made for the whole prompt"
            step.chosen.append((seq, count))
            budget -= count

    def _match(self, seq: Sequence) -> Match:
        if self._tree is None or seq.reuse_limit <= 0:
            return Match([], 0)
        match = seq.match = self._tree.match(seq.token_ids, seq.reuse_limit, seq.match)
        if self._tiers is None:
            return match
        num_full = seq.reuse_limit // self._layout.page_size
        extend_keys(seq.page_keys, seq.token_ids, num_full, self._layout.page_size)
        return self._tiers.extend(match, seq.page_keys[:num_full])

    def _is_coming(self, seq: Sequence, match: Match) -> bool:
        """Tell whether to wait for more of a sequence's prefix to come from disk; send for it."""
        if self._tiers is None or not match.on_disk:
            return False
        now = time.monotonic()
        if seq.patience_ends is None:
            seq.patience_ends = now + _DISK_PATIENCE
        return now < seq.patience_ends and self._tiers.fetch(match)

    def _take(self, seq: Sequence, step: Step) -> bool:
        """Take the pages of a cached prefix, and see that the rest of the prompt finds room."""
        assert not seq.pages
        match = self._match(seq)
        if self._tree is not None:
            self._tree.hold(match)
        if self._tiers is not None:
            self._tiers.hold(match.host_slots)
        # One spare page for each running sequence, or the newcomer would soon be preempted.
        missing = self._layout.pages_for(len(seq.token_ids)) - len(match.pages)
        wanted = missing + len(self.running)
        if not self._make_room(min(wanted, self._pages.num_pages - len(match.held_pages))):
            self._pages.release(match.held_pages)
            return False
        if self._tree is not None:
            is_resumed = seq.num_preempted > 0
            self._tree.count(match, seq.request.conversation_id, is_resumed=is_resumed)
        seq.pages = array("i", match.pages)
        found = len(match.pages) * self._layout.page_size
        if match.partial_page is not None:
            self._pages.release([match.partial_page])
            if self._pages.num_free:
                seq.pages.extend(self._pages.allocate(1))
                step.copies.append((match.partial_page, seq.pages[-1]))
                found = match.num_tokens
        if self._tiers is not None and match.host_slots:
            seq.pages.extend(self._tiers.restore(match.host_slots, self._pages))
            found = match.num_tokens
        seq.num_computed = seq.num_committed = found
        seq.match = None
        self._metrics.reused_tokens += found
        if seq.num_cached is None:
            seq.num_cached = found
            self._metrics.queue_seconds.observe(time.monotonic() - seq.added_at)
        return True
