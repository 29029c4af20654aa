"""The children of a node of the prefix tree, in the order of their tokens.

They lie in runs of bounded length, so that adding one to a million moves a few thousand pointers
and not a million.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from sys import byteorder
from typing import Generic, Protocol, TypeVar

TOKEN_BYTES = 4
# A run that has grown to twice this length is cut in half.
_RUN = 512


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

    __slots__ = ("_keys", "_last", "_nodes")

    def __init__(self) -> None:
        # Of each run: the tokens, the nodes in the same order, and the highest tokens.
        self._keys: list[list[bytes]] = []
        self._nodes: list[list[Child]] = []
        self._last: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self._last)

    def __iter__(self) -> Iterator[Child]:
        return (node for run in self._nodes for node in run)

    def find(self, tokens: bytes) -> Child | None:
        """Return the child with exactly these tokens."""
        run, at = self._place(tokens)
        if run == len(self._last) or self._keys[run][at] != tokens:
            return None
        return self._nodes[run][at]

    def before(self, tokens: bytes) -> Child | None:
        """Return the last child whose tokens come before these."""
        run, at = self._place(tokens)
        if at:
            return self._nodes[run][at - 1]
        return self._nodes[run - 1][-1] if run else None

    def nearest(self, tokens: bytes) -> tuple[Child | None, int]:
        """Return the child that shares most leading tokens with these, and how many."""
        run, at = self._place(tokens)
        after = self._nodes[run][at] if run < len(self._last) else None
        best, most = None, 0
        for child in (self.before(tokens), after):
            common = 0 if child is None else _num_common(child.tokens, tokens)
            if common > most:
                best, most = child, common
        return best, most

    def add(self, child: Child) -> None:
        """Put a child in its place."""
        if not self._last:
            self._keys, self._nodes, self._last = [[child.tokens]], [[child]], [child.tokens]
            return
        run, at = self._place(child.tokens)
        if run == len(self._last):
            run, at = run - 1, len(self._keys[-1])
        keys, nodes = self._keys[run], self._nodes[run]
        keys.insert(at, child.tokens)
        nodes.insert(at, child)
        self._last[run] = keys[-1]
        if len(keys) == 2 * _RUN:
            self._keys[run : run + 1] = keys[:_RUN], keys[_RUN:]
            self._nodes[run : run + 1] = nodes[:_RUN], nodes[_RUN:]
            self._last.insert(run, keys[_RUN - 1])

    def remove(self, child: Child) -> None:
        """Take a child out."""
        run, at = self._place(child.tokens)
        keys, nodes = self._keys[run], self._nodes[run]
        assert nodes[at] is child, "a node is not where it should be"
        del keys[at], nodes[at]
        if keys:
            self._last[run] = keys[-1]
        else:
            del self._keys[run], self._nodes[run], self._last[run]

    def _place(self, tokens: bytes) -> tuple[int, int]:
        """Return run and index of the first child whose tokens are not lower."""
        run = bisect_left(self._last, tokens)
        return run, bisect_left(self._keys[run], tokens) if run < len(self._last) else 0
