"""`Children` compared with a plain dictionary and a sorted list."""

from bisect import bisect_left
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from dsv3.cache.children import Children, encode


@dataclass
class Leaf:
    tokens: bytes


def common(a: bytes, b: bytes) -> int:
    return next(
        (i for i in range(min(len(a), len(b)) // 4) if a[4 * i :][:4] != b[4 * i :][:4]),
        min(len(a), len(b)) // 4,
    )


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(encode)


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=60))
def test_children_equal_a_sorted_list(steps: list[tuple[bool, bytes]]) -> None:
    expected: dict[bytes, Leaf] = {}
    children = Children[Leaf]()
    for is_new, tokens in steps:
        if is_new and tokens not in expected:
            expected[tokens] = Leaf(tokens)
            children.add(expected[tokens])
        elif not is_new and expected:
            keys = sorted(expected)
            children.remove(expected.pop(keys[bisect_left(keys, tokens) % len(keys)]))
        keys = sorted(expected)
        assert [child.tokens for child in children._nodes] == keys
        assert bool(children) == bool(expected)
        assert children.find(tokens) is expected.get(tokens)
        index = bisect_left(keys, tokens)
        assert children.before(tokens) is (expected[keys[index - 1]] if index else None)
        best, num_common = children.nearest(tokens)
        assert num_common == max((common(key, tokens) for key in keys), default=0)
        assert (best is None) == (num_common == 0)
        assert best is None or common(best.tokens, tokens) == num_common
