"""The prefix tree: sharing, copying, pinning, groups and eviction."""

import gc
from array import array
from collections.abc import Sequence

import numpy as np
import pytest

from dsv3.cache.children import encode
from dsv3.cache.eviction import CacheEntry, make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, PrefixTree
from dsv3.cache.prefix_hash import chain_hash, chain_hashes

P = 4


class Cache:
    """A prefix tree, and sequences that are computed at once."""

    def __init__(self, num_pages: int = 16, policy: str = "lru", page_size: int = P) -> None:
        self.pages = PageAllocator(num_pages + 1)
        self.evicted: list[tuple[int, bytes, bytes]] = []
        self.size = page_size
        self.tree = PrefixTree(
            self.pages,
            page_size,
            make_policy(policy, num_pages),
            on_evict=lambda *page: self.evicted.append(page),
        )

    def start(self, tokens: Sequence[int], group: str | None = None) -> list[int]:
        """Compute and register a sequence; return its pages, which it still holds."""
        match = self.tree.match(tokens)
        self.tree.hold(match)
        self.tree.count(match, group)
        missing = -(-len(tokens) // self.size) - len(match.pages)
        assert self.tree.make_room(missing)
        seq_pages = match.pages + self.pages.allocate(missing)
        if match.partial_page is not None:
            self.pages.release([match.partial_page])
        self.tree.insert(tokens, len(tokens), seq_pages, conversation=group)
        return seq_pages

    def run(self, tokens: Sequence[int], group: str | None = None) -> list[int]:
        """Start a sequence and release its pages; return them."""
        seq_pages = self.start(tokens, group)
        self.pages.release(seq_pages)
        return seq_pages

    def cached(self, tokens: Sequence[int]) -> int:
        return self.tree.match(tokens).num_tokens


@pytest.fixture
def cache() -> Cache:
    return Cache()


def ids(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_an_empty_tree_matches_nothing(cache: Cache) -> None:
    assert cache.tree.match(ids(0, 9)) == cache.tree.match([]) == Match([], 0)
    assert cache.pages.num_idle == 0


def test_full_pages_are_shared(cache: Cache) -> None:
    first = cache.start(ids(0, 8))
    second = cache.start([*ids(0, 8), 90, 91])
    assert second[:2] == first
    assert [cache.pages._holders[page] for page in second] == [3, 3, 2]
    cache.pages.release(first + second)
    assert cache.pages.num_idle == 3


@pytest.mark.parametrize("tokens", [ids(0, 7), array("i", ids(0, 7)), np.arange(7)])
def test_tokens_of_any_kind(cache: Cache, tokens: Sequence[int]) -> None:
    cache.run(tokens)
    assert cache.cached(tokens) == cache.cached(ids(0, 7)) == 7


@pytest.mark.parametrize("common", range(1, 11))
def test_a_partial_page_matches_token_by_token(cache: Cache, common: int) -> None:
    pages = cache.run(ids(0, 10))
    match = cache.tree.match([*ids(0, common), 90, 91, 92, 93, 94])
    num_full, num_partial = divmod(common, P)
    assert match.pages == pages[:num_full] and match.num_tokens == common
    assert match.partial_page == (pages[num_full] if num_partial else None)


def test_the_best_of_many_siblings_is_found(cache: Cache) -> None:
    tails = [[5, 5], [5, 6, 1], [5, 6, 7, 1], [5, 7], [2**31 - 1, 0]]
    page = {tuple(tail): cache.run([*ids(0, 4), *tail])[1] for tail in tails}
    for query, tail, common in (
        ([5, 6, 7, 9], (5, 6, 7, 1), 3),
        ([5, 6, 2], (5, 6, 1), 2),
        ([5, 7, 0], (5, 7), 2),
        ([2**31 - 1, 1], (2**31 - 1, 0), 1),
    ):
        match = cache.tree.match([*ids(0, 4), *query])
        assert (match.partial_page, match.num_tokens) == (page[tail], P + common)


def test_the_limit_cuts_inside_a_full_page(cache: Cache) -> None:
    pages = cache.run(ids(0, 8))
    assert cache.tree.match(ids(0, 8), 7) == Match(pages[:1], 7, pages[1])
    assert cache.tree.match(ids(0, 8), 4) == Match(pages[:1], 4)
    assert cache.tree.match(ids(0, 8), 0) == Match([], 0)


def test_held_pages_are_not_evicted_until_released(cache: Cache) -> None:
    pages = cache.run(ids(0, 10))
    match = cache.tree.match(ids(0, 10))
    cache.tree.hold(match)
    cache.tree.count(match)
    assert match.held_pages == pages and cache.pages.num_idle == 0
    assert not cache.tree.make_room(14)
    cache.pages.release(match.held_pages)
    assert cache.tree.make_room(16)


def test_a_tail_grows_with_its_sequence(cache: Cache) -> None:
    tokens = ids(0, 30)
    seq_pages = cache.pages.allocate(8)
    for num_computed in (2, 3, 4, 5, 9, 9, 12, 30):
        cache.tree.insert(tokens, num_computed, seq_pages)
        assert cache.cached(tokens) == num_computed
        in_tree = [page for page, _, _ in cache.tree.deepest_first()]
        assert sorted(in_tree) == sorted(seq_pages[: -(-num_computed // P)])


def test_a_longer_tail_replaces_the_one_it_continues(cache: Cache) -> None:
    old = cache.run(ids(0, 6))
    new = cache.run(ids(0, 7))
    assert new[0] == old[0] and new[1] != old[1]
    assert {page for page, _, _ in cache.tree.deepest_first()} == set(new)
    assert cache.pages.num_free == 14


def test_cached_tokens_are_not_stored_again(cache: Cache) -> None:
    cache.run(ids(0, 11))
    recomputed = cache.pages.allocate(2)
    cache.tree.insert(ids(0, 6), 6, recomputed)
    cache.pages.release(recomputed)
    assert len(list(cache.tree.deepest_first())) == 3 and cache.pages.num_free == 13


def test_equal_pages_computed_twice_are_stored_once(cache: Cache) -> None:
    first, second = cache.pages.allocate(2), cache.pages.allocate(3)
    recomputed = list(second)
    cache.tree.insert(ids(0, 8), 8, first)
    cache.tree.insert(ids(0, 10), 10, second)
    assert second == [*first, recomputed[2]]
    assert [cache.pages._holders[page] for page in first] == [3, 3]
    assert [cache.pages._holders[page] for page in recomputed] == [0, 0, 2]


def test_leaves_are_evicted_before_their_parents() -> None:
    for policy in ("lru", "cost"):
        cache = Cache(policy=policy)
        pages = cache.run(ids(0, 16))
        while cache.pages.num_idle:
            assert cache.tree.make_room(cache.pages.num_free + 1)
        assert [page for page, _, _ in cache.evicted] == pages[::-1]
        assert cache.tree.num_evicted == 4


def test_pages_in_use_are_never_evicted(cache: Cache) -> None:
    seq_pages = cache.start(ids(0, 12))
    cache.run([*ids(0, 4), *ids(50, 8)])
    assert cache.pages.num_idle == 2
    assert not cache.tree.make_room(14) and not cache.evicted
    assert cache.tree.make_room(13)
    assert cache.cached(ids(0, 12)) == 12
    cache.pages.release(seq_pages)
    assert cache.tree.make_room(16)


@pytest.mark.parametrize("policy", ["lru", "cost"])
def test_a_page_in_use_again_is_not_evicted(policy: str) -> None:
    cache = Cache(policy=policy)
    cache.run(ids(0, 8))
    seq_pages = cache.start(ids(0, 8))
    cache.run(ids(50, 8))
    assert cache.tree.make_room(14) and cache.cached(ids(0, 8)) == 8
    cache.pages.release(seq_pages)
    assert cache.tree.make_room(16)


def count_entries() -> int:
    gc.collect()
    return sum(issubclass(type(obj), CacheEntry) for obj in gc.get_objects())


def test_evicted_pages_leave_no_objects_behind() -> None:
    before = count_entries()
    cache = Cache(policy="cost")
    for start in range(0, 4000, 20):
        cache.run(ids(start, 20))
    cache.tree.make_room(16)
    assert count_entries() - before < 10


def test_on_evict_gets_the_hash_of_the_prefix(cache: Cache) -> None:
    tokens = ids(0, 10)
    pages = cache.run(tokens)
    root = chain_hash(b"", encode(tokens[:4]))
    assert cache.tree._node(pages[0]).prefix_hash() == root
    expected = [
        (pages[2], chain_hash(root, encode(tokens[4:8])), encode(tokens[8:])),
        (pages[1], root, encode(tokens[4:8])),
        (pages[0], b"", encode(tokens[:4])),
    ]
    assert list(cache.tree.deepest_first()) == expected
    cache.tree.make_room(16)
    assert cache.evicted == expected


@pytest.mark.parametrize("page_size", [64, 128, 192])
def test_hashes_do_not_depend_on_the_page_size(page_size: int) -> None:
    cache = Cache(page_size=page_size)
    pages = cache.run(ids(7, 384))
    units = chain_hashes(b"", encode(ids(7, 384)))
    assert len(set(units)) == 6
    step = page_size // 64
    assert [cache.tree._node(page).prefix_hash() for page in pages] == units[step - 1 :: step]


@pytest.mark.parametrize("policy", ["lru", "cost"])
def test_pinned_prefixes_stay(policy: str) -> None:
    cache = Cache(8, policy)
    template = ids(0, 6)
    cache.run(template)
    assert cache.tree.pin(template) == cache.tree.pin(template) == 6
    for start in range(100, 200, 10):
        cache.run([*template, *ids(start, 9)])
    assert cache.tree.make_room(6) and not cache.tree.make_room(7)
    assert cache.cached(template) == 6


def test_drop_conversation_removes_only_pages_used_by_it_alone(cache: Cache) -> None:
    system = ids(0, 4)
    cache.run(system)
    cache.run([*system, *ids(10, 6)], "mine")
    cache.run([*system, *ids(20, 6)], "mine")
    cache.run([*system, *ids(20, 4), 99], "yours")
    assert cache.tree.drop_conversation("mine") == 3
    assert cache.cached([*system, *ids(10, 6)]) == 4
    assert cache.cached([*system, *ids(20, 6)]) == 8
    assert cache.tree.drop_conversation("mine") == 0
    assert cache.tree.drop_conversation("yours") == 1
    assert cache.pages.num_idle == 2 and cache.tree.make_room(16)


def test_pages_computed_by_two_groups_belong_to_neither(cache: Cache) -> None:
    for group in ("mine", "yours"):
        seq_pages = cache.pages.allocate(1)
        cache.tree.insert(ids(0, 4), 4, seq_pages, conversation=group)
        cache.pages.release(seq_pages)
    assert cache.tree.drop_conversation("mine") == 0


def test_a_dropped_group_may_still_be_running(cache: Cache) -> None:
    seq_pages = cache.start(ids(0, 10), "chat")
    assert cache.tree.drop_conversation("chat") == 3
    assert cache.cached(ids(0, 10)) == 0 and cache.pages.num_free == 13
    cache.tree.insert(ids(0, 12), 12, seq_pages, conversation="chat")
    assert cache.cached(ids(0, 12)) == 12
    cache.pages.release(seq_pages)
    assert cache.tree.drop_conversation("chat") == 3 and cache.pages.num_free == 16


def test_forget_keeps_pages_that_others_use(cache: Cache) -> None:
    cache.run(ids(0, 4))
    cache.run(ids(0, 14))
    cache.tree.forget(ids(0, 14), 4)
    assert cache.cached(ids(0, 14)) == 4 and cache.pages.num_idle == 1
    cache.run(ids(0, 14))
    cache.run([*ids(0, 8), 99])
    cache.tree.forget(ids(0, 14), 0)  # its second page is shared with another prefix
    assert cache.cached(ids(0, 14)) == 8 and cache.cached([*ids(0, 8), 99]) == 9
    cache.tree.pin([*ids(0, 8), 99])
    cache.tree.forget([*ids(0, 8), 99], 0)
    assert cache.cached([*ids(0, 8), 99]) == 9
    cache.tree.forget(ids(50, 7), 0)
    assert cache.tree.make_room(13)


def test_pinning_takes_a_prefix_from_its_group(cache: Cache) -> None:
    cache.run(ids(0, 8), "chat")
    cache.tree.pin(ids(0, 4))
    assert cache.tree.drop_conversation("chat") == 1
    assert cache.cached(ids(0, 8)) == 4


def test_a_stale_match_is_refused(cache: Cache) -> None:
    cache.run(ids(0, 4))
    match = cache.tree.match(ids(0, 4))
    cache.tree.make_room(16)
    with pytest.raises(AssertionError, match="is free"):
        cache.tree.hold(match)
