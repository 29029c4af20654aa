"""Scheduler of one data-parallel group: the tokens of the next step, and the pages they need.

Every step takes one token of each sequence that is generating, then fills the token budget with
drafts and prompt chunks, then admits waiting requests. Pages are taken as sequences grow. When none
is left, idle cached ones are evicted; after those, the running request that came last gives up its
pages and resumes later, from the part of its prefix that is still cached.

Rank 0 only; plain numbers, no tensors. The scheduler owns its group's pages, prefix tree and lower
cache tiers. `groups` chooses among several schedulers.
"""

import time
from array import array
from bisect import insort
from collections import Counter
from collections.abc import Iterator

from dsv3.cache.eviction import make_policy
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, PrefixTree
from dsv3.cache.tiers import Moves, PageKey, Tiers, extend_keys
from dsv3.config import ModelConfig
from dsv3.engine.admission import Admission
from dsv3.engine.metrics import Metrics
from dsv3.engine.scheduled import ScheduledSeq, ScheduledStep
from dsv3.engine.sequence import Sequence
from dsv3.engine.speculation import Speculation
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.settings import EngineConfig

# Seconds that a request waits at most, all in all, for its prefix to come from disk.
_DISK_PATIENCE = 10.0
# Load of one sequence, in prompt tokens: it takes part in many more steps.
_SEQUENCE_LOAD = 64
# Weight of the tokens that a group must compute itself, against the load ahead of them. An idle
# group could begin at once with a prefix that another one is computing, but the work is done twice.
_UNCACHED_WEIGHT = 2


class Scheduler:
    """Waiting and running sequences of a group, and its cache.

    Args:
        config: the model.
        layout: geometry of the pages.
        num_pages: pages of the group's cache, the null page counted.
        settings: limits of a step; prefix reuse and eviction.
        tiers: prefixes kept outside the device; None keeps none.
        metrics: counters that all groups share.
        is_only: there is no other group, so requests are not compared with those under way.
        speculation: how tokens are drafted.

    Attributes:
        pages: the allocator.
        tree: cached prefixes; None reuses nothing.
        tiers: as given.
        waiting, running: sequences in their order.
        num_pinned: pages that are never evicted.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: CacheLayout,
        num_pages: int,
        settings: EngineConfig,
        tiers: Tiers | None,
        metrics: Metrics,
        is_only: bool,
        speculation: Speculation,
    ) -> None:
        self._speculation = speculation
        self._has_drafts = speculation.num_drafts > 0
        self._layout = layout
        self._metrics = metrics
        self._is_only = is_only
        self._rule = AbsorbRule.make(config, settings)
        self._max_batch_tokens = settings.max_batch_tokens
        self._max_running = settings.max_running
        self.pages = PageAllocator(num_pages)
        self.tiers = tiers
        self.num_pinned = 0
        self.tree: PrefixTree | None = None
        if settings.prefix_reuse:
            depth_cost = layout.page_size * config.attention_share
            policy = make_policy(settings.eviction, self.pages.num_pages, depth_cost)
            on_evict = None if tiers is None else tiers.offload
            self.tree = PrefixTree(self.pages, layout.page_size, policy, on_evict=on_evict)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._num_waiting_tokens = 0
        # Set when the best waiting request found no room; nothing changes until pages come free.
        self._is_out_of_pages = False
        # Full pages of unfinished requests' prompts, by name: cached soon, if not yet.
        self._pages_to_come: Counter[PageKey] = Counter()

    # Requests ---------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Add a new sequence to the waiting ones."""
        seq.num_uncached = self._num_uncached(seq)
        self._pages_to_come.update(self._prompt_keys(seq))
        self._enqueue(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that is done or cancelled; its computed prefix stays cached."""
        self._forget_pages_to_come(seq)
        seq.is_done = True
        self._is_out_of_pages = False
        if seq.is_running:
            self._stop(seq)
            return
        self.waiting.remove(seq)
        self._num_waiting_tokens -= seq.num_uncached

    def pop_last_waiting(self) -> Sequence:
        """Remove the last waiting sequence and return it."""
        seq = self.waiting.pop()
        self._num_waiting_tokens -= seq.num_uncached
        self._forget_pages_to_come(seq)
        return seq

    def _enqueue(self, seq: Sequence) -> None:
        self._is_out_of_pages = False
        self._num_waiting_tokens += seq.num_uncached
        insort(self.waiting, seq, key=lambda s: s.order)

    # Choice of a group ------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """True if waiting requests cannot be admitted until running ones finish."""
        return self._is_out_of_pages or len(self.running) >= self._max_running

    @property
    def computes_prompts(self) -> bool:
        """True if the next step is likely to compute a prompt or part of one."""
        admits = bool(self.waiting) and not self.is_full
        return admits or any(seq.num_left > 1 for seq in self.running)

    @property
    def num_free_places(self) -> int:
        """Number of sequences that could run in addition to the running and waiting ones."""
        return self._max_running - len(self.running) - len(self.waiting)

    def cost(self, seq: Sequence) -> tuple[int, int]:
        """Return the cost of a new sequence in this group, in tokens; ties go to free pages."""
        num_ahead = self._num_waiting_tokens + sum(other.num_left for other in self.running)
        num_ahead += _SEQUENCE_LOAD * (len(self.waiting) + len(self.running))
        return num_ahead + _UNCACHED_WEIGHT * self._num_uncached(seq), -self.pages.num_free

    def _num_uncached(self, seq: Sequence) -> int:
        """Return the tokens of a prompt that are neither cached nor computed soon."""
        if self._is_only:
            return seq.prompt_len
        keys = self._prompt_keys(seq)
        num_known_pages = next(
            (i for i, key in enumerate(keys) if key not in self._pages_to_come), len(keys)
        )
        num_to_come = min(num_known_pages * self._layout.page_size, seq.reuse_limit)
        return seq.prompt_len - max(num_to_come, self._match(seq).num_tokens)

    def _prompt_keys(self, seq: Sequence) -> list[PageKey]:
        """Return the names of the full pages of a prompt; none where no groups are compared."""
        if self.tree is None or self._is_only:
            return []
        num_full = seq.prompt_len // self._layout.page_size
        extend_keys(seq.page_keys, seq.token_ids, num_full, self._layout.page_size)
        return seq.page_keys[:num_full]

    def _forget_pages_to_come(self, seq: Sequence) -> None:
        for key in self._prompt_keys(seq):
            self._pages_to_come[key] -= 1
            if not self._pages_to_come[key]:
                del self._pages_to_come[key]

    # Steps ------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work; pages are allocated, `num_computed` is not yet advanced."""
        step = ScheduledStep()
        budget = self._max_batch_tokens - sum(seq.num_left == 1 for seq in self.running)
        for seq in self._until_preempted():
            left = seq.num_left
            count = left if left <= 1 else min(left, budget)
            if count > 0 and self._grow(seq, count):
                drafts = self._drafts(seq, budget) if left == 1 and self._has_drafts else ()
                step.seqs.append(ScheduledSeq.of(seq, count, count == left, drafts))
                # The budget excludes the one token of a decoding sequence already.
                budget -= count if left > 1 else len(drafts)
        if self.waiting and len(self.running) < self._max_running and not self._is_out_of_pages:
            self._admit(budget, step)
        step.seqs.sort(key=self._place)
        if self.tiers is not None:
            step.moves = self.tiers.draw(is_idle=not step.seqs)
        return step

    def _drafts(self, seq: Sequence, budget: int) -> list[int]:
        """Return the drafts to verify, as many as find room in the budget and in pages.

        Pages are allocated for them if some are free or idle; no sequence is preempted for drafts.
        """
        num_left = seq.request.params.max_tokens - seq.num_generated
        drafts = seq.drafts[: max(0, min(budget, num_left - 1))]
        # The MTP layer also writes the entries of the drafts that it makes, where there is room.
        num_new = 1 + len(drafts) + self._speculation.num_drafts * self._speculation.has_mtp
        missing = self._layout.pages_for(seq.num_computed + num_new) - len(seq.pages)
        if missing > 0 and self._make_room(missing):
            seq.pages.extend(self.pages.allocate(missing))
        room = len(seq.pages) * self._layout.page_size - seq.num_computed
        return drafts[: room - 1]

    def _place(self, part: ScheduledSeq) -> tuple[bool, int, int]:
        """Return the sort key of a sequence: first all that attend straight to the cache."""
        num_cached = part.seq.num_computed
        is_expanded = not self._rule.absorbs(part.num_tokens, num_cached)
        return is_expanded, part.num_tokens, num_cached

    def commit(self, part: ScheduledSeq) -> None:
        """Count a sequence's new positions as computed, and offer them for reuse.

        A sequence that was preempted since the step was scheduled has lost those positions.
        """
        seq = part.seq
        if not seq.is_running or seq.num_preempted != part.num_preempted:
            return
        seq.num_committed = part.stop
        if part.num_tokens > 1 or part.stop % self._layout.page_size == 0:
            self._offer_prefix(seq)

    def withdraw(self, seq: Sequence) -> None:
        """Take a sequence's computed prefix out of the prefix cache: it may not be finite.

        Within a step, NaN spoils entries of earlier positions too: a masked key has weight zero,
        and zero times NaN is NaN.
        """
        if self.tree is not None and seq.is_running:
            self.tree.forget(seq.token_ids[: seq.num_committed], seq.num_cached or 0)
        seq.num_committed = 0

    def _until_preempted(self) -> Iterator[Sequence]:
        """Iterate over the running sequences, of which the last may be preempted on the way."""
        i = 0
        while i < len(self.running):
            yield self.running[i]
            i += 1

    # Pages ------------------------------------------------------------------------------------

    @property
    def num_usable_pages(self) -> int:
        """Pages that are not pinned."""
        return self.pages.num_pages - self.num_pinned

    def pin(self, prompts: list[list[int]]) -> int:
        """Protect cached prompts from eviction; return their number of tokens."""
        assert self.tree is not None, "nothing is cached"
        num_tokens = sum(self.tree.pin(ids) for ids in prompts)
        self.num_pinned = self.tree.num_pinned
        return num_tokens

    def save(self) -> Iterator[Moves]:
        """Write the cache to disk, if there is a disk cache; yields the moves, plan by plan."""
        if self.tiers is not None and self.tree is not None:
            yield from self.tiers.save(self.tree)

    def _make_room(self, num_pages: int) -> bool:
        if self.tree is not None:
            return self.tree.make_room(num_pages)
        return self.pages.num_free >= num_pages

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give a sequence the pages for more tokens, at the cost of later sequences."""
        missing = self._layout.pages_for(seq.num_computed + num_tokens) - len(seq.pages)
        if missing <= 0:
            return True
        while not self._make_room(missing):
            if self.running[-1] is seq:
                return False
            self._preempt(self.running[-1])
        seq.pages.extend(self.pages.allocate(missing))
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._metrics.preemptions += 1
        self._stop(seq)
        self._enqueue(seq)

    def _stop(self, seq: Sequence) -> None:
        """Take a running sequence's pages; its computed prefix stays cached."""
        self._offer_prefix(seq)
        self.running.remove(seq)
        self.pages.release(seq.pages)
        seq.rewind()

    def _offer_prefix(self, seq: Sequence) -> None:
        if self.tree is not None and seq.is_running:
            conversation = seq.request.conversation_id
            # Accepted drafts are committed before they are among the tokens.
            num_known = min(seq.num_committed, len(seq.token_ids))
            self.tree.insert(seq.token_ids, num_known, seq.pages, conversation=conversation)

    # Admission --------------------------------------------------------------------------------

    def _admit(self, budget: int, step: ScheduledStep) -> None:
        """Move waiting sequences to the running ones, as long as their prompts find room."""
        running = None if self.tree is None else self.running
        admission = Admission(self._match, self._waits_for_disk, running)
        while budget > 0 and len(self.running) < self._max_running:
            seq = admission.choose(self.waiting)
            if seq is None:
                return
            if not self._take_prefix(seq, step):
                self._is_out_of_pages = True
                return
            admission.admitted(seq, self.waiting)
            self.waiting.remove(seq)
            self._num_waiting_tokens -= seq.num_uncached
            insort(self.running, seq, key=lambda s: s.order)
            seq.is_running = True
            left = seq.num_left
            count = min(left, budget)
            grown = self._grow(seq, count)
            assert grown, "room was made for the whole prompt"
            step.seqs.append(ScheduledSeq.of(seq, count, count == left))
            budget -= count

    def _match(self, seq: Sequence) -> Match:
        """Return the longest cached prefix of a sequence, lower tiers included."""
        if self.tree is None or seq.reuse_limit <= 0:
            return Match([], 0)
        match = seq.match = self.tree.match(seq.token_ids, seq.reuse_limit, seq.match)
        if self.tiers is None:
            return match
        num_full = seq.reuse_limit // self._layout.page_size
        extend_keys(seq.page_keys, seq.token_ids, num_full, self._layout.page_size)
        return self.tiers.extend(match, seq.page_keys[:num_full])

    def _waits_for_disk(self, seq: Sequence, match: Match) -> bool:
        """Return True if more of a sequence's prefix is on its way from disk; fetches it."""
        if self.tiers is None or not match.on_disk:
            return False
        now = time.monotonic()
        if seq.disk_wait_until is None:
            seq.disk_wait_until = now + _DISK_PATIENCE
        return now < seq.disk_wait_until and self.tiers.fetch(match)

    def _take_prefix(self, seq: Sequence, step: ScheduledStep) -> bool:
        """Give a sequence its cached prefix; return False if the rest of it finds no room."""
        assert not seq.pages
        match = self._match(seq)
        if self.tree is not None:
            self.tree.hold(match)
        if self.tiers is not None:
            self.tiers.hold(match.host_pages)
        # One spare page for each running sequence, or the new one would soon be preempted.
        missing = self._layout.pages_for(len(seq.token_ids)) - len(match.pages)
        wanted = missing + len(self.running)
        if not self._make_room(min(wanted, self.pages.num_pages - len(match.held_pages))):
            self.pages.release(match.held_pages)
            return False
        if self.tree is not None:
            is_resumed = seq.num_preempted > 0
            self.tree.count(match, seq.request.conversation_id, is_resumed=is_resumed)
        num_found = self._take_pages(seq, match, step)
        seq.num_computed = seq.num_committed = num_found
        seq.match = None
        self._metrics.reused_tokens += num_found
        if seq.num_cached is None:
            seq.num_cached = num_found
            self._metrics.queue_seconds.observe(time.monotonic() - seq.added_at)
        return True

    def _take_pages(self, seq: Sequence, match: Match, step: ScheduledStep) -> int:
        """Give a sequence the pages of a match; return the tokens that they hold."""
        seq.pages = array("i", match.pages)
        num_found = len(match.pages) * self._layout.page_size
        if match.partial_page is not None:
            self.pages.release([match.partial_page])
            if self.pages.num_free:
                seq.pages.extend(self.pages.allocate(1))
                step.copies.append((match.partial_page, seq.pages[-1]))
                num_found = match.num_tokens
        if self.tiers is not None and match.host_pages:
            seq.pages.extend(self.tiers.restore(match.host_pages, self.pages))
            num_found = match.num_tokens
        return num_found
