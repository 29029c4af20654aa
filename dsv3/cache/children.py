"""The children of a node of the prefix tree, in the order of their tokens."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
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
    """Return how many leading tokens two encodings share."""
    length = min(len(a), len(b))
    differing = int.from_bytes(a[:length], "big") ^ int.from_bytes(b[:length], "big")
    return (length - (differing.bit_length() + 7) // 8) // TOKEN_BYTES


class _Child(Protocol):
    tokens: bytes


Child = TypeVar("Child", bound=_Child)


class Children(Generic[Child]):
    """Nodes by their encoded tokens; no two have the same."""

    __slots__ = ("_keys", "_nodes")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._nodes: list[Child] = []

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __iter__(self) -> Iterator[Child]:
        return iter(self._nodes)

    def find(self, tokens: bytes) -> Child | None:
        """Return the child with exactly these tokens."""
        at = bisect_left(self._keys, tokens)
        return self._nodes[at] if self._keys[at : at + 1] == [tokens] else None

    def before(self, tokens: bytes) -> Child | None:
        """Return the last child whose tokens come before these."""
        at = bisect_left(self._keys, tokens)
        return self._nodes[at - 1] if at else None

    def nearest(self, tokens: bytes) -> tuple[Child | None, int]:
        """Return the child that shares most leading tokens with these, and how many."""
        at = bisect_left(self._keys, tokens)
        best, most = None, 0
        for child in self._nodes[max(0, at - 1) : at + 1]:
            common = _num_common(child.tokens, tokens)
            if common > most:
                best, most = child, common
        return best, most

    def add(self, child: Child) -> None:
        """Put a child in its place; moving the pointers behind it costs little among thousands."""
        at = bisect_left(self._keys, child.tokens)
        self._keys.insert(at, child.tokens)
        self._nodes.insert(at, child)

    def remove(self, child: Child) -> None:
        """Take a child out."""
        at = bisect_left(self._keys, child.tokens)
        assert self._nodes[at] is child, "a node is not where it should be"
        del self._keys[at], self._nodes[at]
