"""A look-up that continues an earlier match finds the same as a new one, after any events."""

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
def test_continued_matches_equal_new_ones(
    queries: list[list[int]], events: list[list[int] | int], limit: int
) -> None:
    pages = PageAllocator(NUM_PAGES + 1)
    tree = PrefixTree(pages, PAGE_SIZE, make_policy("lru", NUM_PAGES))
    known: list[Match | None] = [None] * len(queries)
    for event in events:
        if isinstance(event, int):
            assert tree.make_room(event)
        else:
            count = -(-len(event) // PAGE_SIZE)
            assert tree.make_room(count)
            seq_pages = pages.allocate(count)
            tree.insert(event, len(event), seq_pages)
            pages.release(seq_pages)
        for i, query in enumerate(queries):
            # The limit differs from the previous look-up's, too.
            shorter = min(limit, len(query)) - i % 2
            for stop in (shorter, len(query)):
                known[i] = tree.match(query, stop, known[i])
                assert known[i] == tree.match(query, stop)
