"""Sorted container for the children of a prefix-tree node, ordered by their tokens."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence as Ids
from sys import byteorder
from typing import Generic, Protocol, TypeVar

TOKEN_BYTES = 4


def encode(token_ids: Ids[int]) -> bytes:
    """Return token ids as big-endian 32-bit integers."""
    words = array("i", token_ids)
    if byteorder == "little":
        words.byteswap()
    return words.tobytes()


def _num_common(a: bytes, b: bytes) -> int:
    """Return the number of leading tokens that two encodings share."""
    length = min(len(a), len(b))
    # As big-endian numbers, the XOR of the two begins at the first byte that differs: one operation
    # on large integers is much faster than a loop over the tokens of a page.
    differing = int.from_bytes(a[:length], "big") ^ int.from_bytes(b[:length], "big")
    num_differing_bytes = (differing.bit_length() + 7) // 8
    return (length - num_differing_bytes) // TOKEN_BYTES


class _Child(Protocol):
    tokens: bytes


Child = TypeVar("Child", bound=_Child)


class Children(Generic[Child]):
    """Nodes sorted by their encoded tokens, which are unique among siblings."""

    __slots__ = ("_keys", "_nodes")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._nodes: list[Child] = []

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, tokens: bytes) -> Child | None:
        """Return the child with exactly these tokens."""
        index = bisect_left(self._keys, tokens)
        if index < len(self._keys) and self._keys[index] == tokens:
            return self._nodes[index]
        return None

    def before(self, tokens: bytes) -> Child | None:
        """Return the last child whose tokens sort before these."""
        index = bisect_left(self._keys, tokens)
        return self._nodes[index - 1] if index else None

    def nearest(self, tokens: bytes) -> tuple[Child | None, int]:
        """Return the child with the longest common prefix, and its number of common tokens.

        (None, 0) if no child shares the first token.
        """
        index = bisect_left(self._keys, tokens)
        best: Child | None = None
        max_common = 0
        # Keys are sorted, so the longest common prefix is with one of the two neighbours.
        for child in self._nodes[max(0, index - 1) : index + 1]:
            common = _num_common(child.tokens, tokens)
            if common > max_common:
                best = child
                max_common = common
        return best, max_common

    def add(self, child: Child) -> None:
        """Insert a child at its sorted index. O(n) in the siblings, cheap up to thousands."""
        index = bisect_left(self._keys, child.tokens)
        self._keys.insert(index, child.tokens)
        self._nodes.insert(index, child)

    def remove(self, child: Child) -> None:
        """Remove a child."""
        index = bisect_left(self._keys, child.tokens)
        assert self._nodes[index] is child, "the children are not sorted by their tokens"
        del self._keys[index]
        del self._nodes[index]
