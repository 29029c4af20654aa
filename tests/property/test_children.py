"""A node's children against a plain sorted list."""

from bisect import bisect_left
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from dsv3.cache.children import Children, encode


@dataclass(frozen=True)
class Child:
    tokens: bytes


def common(a: bytes, b: bytes) -> int:
    return next(
        (i for i in range(min(len(a), len(b)) // 4) if a[4 * i :][:4] != b[4 * i :][:4]),
        min(len(a), len(b)) // 4,
    )


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(encode)


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=60))
def test_like_a_sorted_list(steps: list[tuple[bool, bytes]]) -> None:
    held: dict[bytes, Child] = {}
    those = Children[Child]()
    for is_new, tokens in steps:
        if is_new and tokens not in held:
            held[tokens] = Child(tokens)
            those.add(held[tokens])
        elif not is_new and held:
            keys = sorted(held)
            those.remove(held.pop(keys[bisect_left(keys, tokens) % len(keys)]))
        keys = sorted(held)
        assert [child.tokens for child in those] == keys
        assert bool(those) == bool(held)
        assert those.find(tokens) is held.get(tokens)
        at = bisect_left(keys, tokens)
        assert those.before(tokens) is (held[keys[at - 1]] if at else None)
        best, most = those.nearest(tokens)
        assert most == max((common(key, tokens) for key in keys), default=0)
        assert (best is None) == (most == 0)
        assert best is None or common(best.tokens, tokens) == most
