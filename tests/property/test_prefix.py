"""The prefix tree under random histories: contents match, counts are exact, no page leaks."""

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsv3.cache.children import encode
from dsv3.cache.eviction import POLICIES, make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import PrefixTree

PAGE_SIZE, NUM_PAGES = 4, 24
# Few distinct tokens, so that prefixes often agree, and diverge in the middle of a page.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
GROUPS = st.sampled_from([None, "a", "b"])


@dataclass(eq=False)
class Running:
    """A sequence that holds pages; all its tokens are computed."""

    tokens: list[int]
    group: str | None
    pages: list[int] = field(default_factory=list)
    # Number of full pages that must be in the tree as long as the sequence runs.
    num_cached: int = 0


class CacheMachine(RuleBasedStateMachine):
    """Sequences that start, grow, are cached and finish on far too few pages, and a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(NUM_PAGES + 1)
        self.running: list[Running] = []
        self.pinned: list[tuple[list[int], int, list[int]]] = []
        # The pages' tokens: written by sequences, never cleared, as on a device.
        self.memory = [[-1] * PAGE_SIZE for _ in range(NUM_PAGES + 1)]

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def build(self, policy: str) -> None:
        self.tree = PrefixTree(self.pages, PAGE_SIZE, make_policy(policy, self.pages.num_pages))

    def content(self, pages: list[int]) -> list[int]:
        return [token for page in pages for token in self.memory[page]]

    def cached(self) -> dict[int, bytes]:
        """The encoded tokens of the cached pages."""
        return {page: tokens for page, _, tokens in self.tree.deepest_first()}

    def extend(self, seq: Running, tokens: list[int]) -> bool:
        """Compute more tokens of a sequence; return False if there are no pages for them."""
        wanted = -(-(len(seq.tokens) + len(tokens)) // PAGE_SIZE) - len(seq.pages)
        if not self.tree.make_room(wanted):
            return False
        seq.pages += self.pages.allocate(wanted)
        for token in tokens:
            page, slot = divmod(len(seq.tokens), PAGE_SIZE)
            self.memory[seq.pages[page]][slot] = token
            seq.tokens.append(token)
        return True

    @rule(prompt=TOKENS, group=GROUPS, limit=st.integers(0, 14))
    def start(self, prompt: list[int], group: str | None, limit: int) -> None:
        match = self.tree.match(prompt, limit)
        num_partial = match.num_tokens - len(match.pages) * PAGE_SIZE
        assert match.num_tokens <= limit and 0 <= num_partial <= PAGE_SIZE
        assert (match.partial_page is None) == (num_partial == 0)
        assert self.content(match.held_pages)[: match.num_tokens] == prompt[: match.num_tokens]
        self.tree.hold(match)
        self.tree.count(match, group)
        num_full = len(match.pages)
        seq = Running(prompt[: num_full * PAGE_SIZE], group, list(match.pages), num_full)
        self.running.append(seq)
        # Instead of copying the partial page, compute its tokens again.
        fits = self.extend(seq, prompt[len(seq.tokens) :])
        if match.partial_page is not None:
            self.pages.release([match.partial_page])
        if not fits:
            self.finish(len(self.running) - 1)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0), tokens=TOKENS)
    def grow(self, index: int, tokens: list[int]) -> None:
        self.extend(self.running[index % len(self.running)], tokens)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0))
    def insert(self, index: int) -> None:
        seq = self.running[index % len(self.running)]
        self.tree.insert(seq.tokens, len(seq.tokens), seq.pages, conversation=seq.group)
        seq.num_cached = len(seq.tokens) // PAGE_SIZE
        assert self.tree.match(seq.tokens).num_tokens == len(seq.tokens)
        assert self.content(seq.pages)[: len(seq.tokens)] == seq.tokens

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0))
    def finish(self, index: int) -> None:
        self.pages.release(self.running.pop(index % len(self.running)).pages)

    @rule(count=st.integers(0, NUM_PAGES))
    def make_room(self, count: int) -> None:
        free, evictable = self.pages.num_free, self.pages.num_idle
        assert self.tree.make_room(count) == (count <= free + evictable)
        assert self.pages.num_free == (max(free, count) if count <= free + evictable else free)

    @precondition(lambda self: len(self.pinned) < 2)
    @rule(tokens=TOKENS)
    def pin(self, tokens: list[int]) -> None:
        if any(tokens == pinned for pinned, _, _ in self.pinned):
            return
        match = self.tree.match(tokens)
        assert self.tree.pin(tokens) == match.num_tokens
        self.pinned.append((tokens, match.num_tokens, match.held_pages))

    @rule(tokens=TOKENS, start=st.integers(0, 14))
    def forget(self, tokens: list[int], start: int) -> None:
        kept = self.cached()
        self.tree.forget(tokens, start)
        gone = kept.keys() - self.cached().keys()
        assert not any(page in pinned[-1:] for page in gone for _, _, pinned in self.pinned)
        for seq in self.running:
            if gone & set(seq.pages):
                seq.num_cached = 0

    @rule(group=st.sampled_from(["a", "b"]))
    def drop_conversation(self, group: str) -> None:
        self.tree.drop_conversation(group)
        for seq in self.running:
            if seq.group == group:
                seq.num_cached = 0

    @invariant()
    def holders_are_exact(self) -> None:
        holders = Counter(page for page, _, _ in self.tree.deepest_first())
        assert max(holders.values(), default=0) <= 1, "a page is in two places of the tree"
        idle = set(holders)
        seq_pages = [seq.pages for seq in self.running]
        pinned_pages = [pages for _, _, pages in self.pinned]
        for held_pages in seq_pages + pinned_pages:
            holders.update(held_pages)
            idle -= set(held_pages)
        pages = range(1, NUM_PAGES + 1)
        assert [self.pages._holders[page] for page in pages] == [holders[p] for p in pages]
        assert self.pages.num_free + len(holders) == self.pages.num_pages == NUM_PAGES
        assert self.pages.num_idle == len(idle)

    @invariant()
    def tree_pages_hold_their_tokens(self) -> None:
        for page, tokens in self.cached().items():
            assert encode(self.memory[page]).startswith(tokens)

    @invariant()
    def pages_in_use_stay(self) -> None:
        for seq in self.running:
            assert (
                self.tree.match(seq.tokens).pages[: seq.num_cached] == seq.pages[: seq.num_cached]
            )

    @invariant()
    def pinned_prefixes_stay(self) -> None:
        for tokens, num_tokens, _ in self.pinned:
            assert self.tree.match(tokens).num_tokens >= num_tokens


CacheMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
TestCache = CacheMachine.TestCase


def test_a_million_operations_leak_no_page() -> None:
    """Allocate, fork and free at random: counts stay exact, and no page becomes unreachable."""
    num_pages, rng = 500, random.Random(11)
    pages = PageAllocator(num_pages + 1)
    holders = [0] * (num_pages + 1)
    allocations: list[list[int]] = []
    for step in range(1_000_000):
        action = rng.random()
        if allocations and (action < 0.45 or pages.num_free < 4):
            changed = allocations.pop(rng.randrange(len(allocations)))
            pages.release(changed)
            change = -1
        elif allocations and action < 0.6:
            changed = allocations[rng.randrange(len(allocations))]
            pages.retain(changed)
            allocations.append(list(changed))
            change = 1
        else:
            changed = pages.allocate(rng.randrange(1, 5))
            assert not any(holders[page] for page in changed)
            allocations.append(changed)
            change = 1
        for page in changed:
            holders[page] += change
        if step % 50_000 == 0:
            assert holders == [pages._holders[page] for page in range(num_pages + 1)]
            assert pages.num_free == holders[1:].count(0)
    for allocated in allocations:
        pages.release(allocated)
    assert sorted(pages.allocate(num_pages)) == list(range(1, num_pages + 1))
