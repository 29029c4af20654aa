"""A look-up that goes on from an earlier one finds what a fresh one finds, whatever happened."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.cache.eviction import make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, PrefixTree

PAGE_SIZE, NUM_PAGES = 2, 12
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    queries=st.lists(TOKENS, min_size=1, max_size=4),
    events=st.lists(st.one_of(TOKENS, st.integers(1, NUM_PAGES)), max_size=25),
    limit=st.integers(1, 12),
)
def test_known_matches(queries: list[list[int]], events: list[list[int] | int], limit: int) -> None:
    pages = PageAllocator(NUM_PAGES + 1)
    tree = PrefixTree(pages, PAGE_SIZE, make_policy("lru", NUM_PAGES))
    known: list[Match | None] = [None] * len(queries)
    for event in events:
        if isinstance(event, int):
            assert tree.make_room(event)
        else:
            count = -(-len(event) // PAGE_SIZE)
            assert tree.make_room(count)
            held = pages.allocate(count)
            tree.insert(event, len(event), held)
            pages.release(held)
        for i, query in enumerate(queries):
            # The limit differs from the last time's, too.
            shorter = min(limit, len(query)) - i % 2
            for stop in (shorter, len(query)):
                known[i] = tree.match(query, stop, known[i])
                assert known[i] == tree.match(query, stop)
