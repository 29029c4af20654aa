"""A tree over token ids whose nodes are cached pages: finds, shares and evicts prefixes.

A node stands for one page and the tokens cached in it. A path from the root spells a prefix; only
full pages have children, and a leaf may be a partial page, the tail of some sequence. A new
sequence shares the full pages of the longest prefix it has in common with the tree, and copies the
page after them if that one agrees with it in its first tokens.

Whoever holds a page of the tree holds the pages above it too. So an idle page (one that only the
tree holds) has only idle pages below it, and all idle pages can be evicted, leaves first.
"""

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from hashlib import blake2b

from dsv3.cache.children import TOKEN_BYTES, Children, encode
from dsv3.cache.eviction import CacheEntry, EvictionPolicy
from dsv3.cache.layout import NULL_PAGE
from dsv3.cache.pages import PageAllocator

# Hashes are chained over units of this many positions, so that they do not depend on page_size.
_HASH_UNIT = 64


def chain_hashes(parent: bytes, tokens: bytes) -> list[bytes]:
    """Return the hashes of the prefixes that end with each unit of the encoded tokens added."""
    step, hashes = _HASH_UNIT * TOKEN_BYTES, []
    for start in range(0, len(tokens), step):
        parent = blake2b(parent + tokens[start : start + step], digest_size=16).digest()
        hashes.append(parent)
    return hashes


def chain_hash(parent: bytes, tokens: bytes) -> bytes:
    """Return the hash of a prefix from the hash of its beginning and the encoded tokens added."""
    return chain_hashes(parent, tokens)[-1] if tokens else parent


class _Node(CacheEntry):
    """A cached page: its tokens (encoded), its place in the tree, the group that owns it alone."""

    __slots__ = ("children", "digest", "group", "page", "parent", "tokens")

    def __init__(self, parent: "_Node | None", tokens: bytes, page: int, group: str | None) -> None:
        super().__init__(parent, tokens)
        self.parent, self.tokens, self.page, self.group = parent, tokens, page, group
        self.digest: bytes | None = None
        self.children = Children[_Node]()

    def prefix_hash(self) -> bytes:
        """Return the hash of the prefix that ends with this page, kept for the next time."""
        missing, node = [], self
        while node.digest is None:
            missing.append(node)
            assert node.parent is not None
            node = node.parent
        digest = node.digest
        for node in reversed(missing):
            digest = node.digest = chain_hash(digest, node.tokens)
        return digest


@dataclass(frozen=True, slots=True)
class Match:
    """The part of a query that is cached.

    Attributes:
        pages: full pages to share, in order.
        num_tokens: all tokens found, those in the partial page included.
        partial_page: page whose first `partial_tokens` positions hold the next tokens; to be
            copied before it is continued. None if there is no such page.
        last: the node of the last of `pages`, from which a later look-up goes on.
        host_slots: slots of host memory with the full pages after `pages`; see tiers.py.
        on_disk: names of full pages after those that are on disk.
    """

    pages: list[int]
    num_tokens: int
    partial_page: int | None = None
    partial_tokens: int = 0
    last: _Node | None = field(default=None, repr=False, compare=False)
    host_slots: tuple[int, ...] = ()
    on_disk: tuple[tuple[bytes, ...], ...] = ()

    @property
    def held_pages(self) -> list[int]:
        """The pages that `PrefixTree.hold` retains for the caller."""
        return self.pages if self.partial_page is None else [*self.pages, self.partial_page]


class PrefixTree:
    """The prefixes whose pages are cached.

    Args:
        pages: the allocator the pages come from.
        page_size: positions of a page.
        policy: decides which idle page is evicted first.
        on_evict: called before an evicted page is freed with the page, the hash of the prefix
            before it, and its encoded tokens.
    """

    def __init__(
        self,
        pages: PageAllocator,
        page_size: int,
        policy: EvictionPolicy,
        on_evict: Callable[[int, bytes, bytes], None] | None = None,
    ) -> None:
        self._pages, self._page_size, self._policy = pages, page_size, policy
        self._on_evict = on_evict
        self._root = _Node(None, b"", NULL_PAGE, None)
        self._root.digest = b""
        self._nodes: list[_Node | None] = [None] * (pages.num_pages + 1)
        self._groups: dict[str, set[_Node]] = {}
        self._pinned: dict[bytes, list[int]] = {}
        self.num_evicted = 0
        pages.on_idle = self._on_idle

    def match(
        self, token_ids: Ids[int], limit: int | None = None, known: Match | None = None
    ) -> Match:
        """Find the longest cached prefix of `token_ids`, of at most `limit` tokens.

        A pure look-up. Its result is good until pages are evicted: `hold` it before making room.
        `known` may be an earlier match of the same tokens: it saves finding its pages again.
        """
        stop = len(token_ids) if limit is None else min(limit, len(token_ids))
        node, pages = self._resume(known, stop)
        start = len(pages) * self._page_size
        while True:
            rest = encode(token_ids[start : min(start + self._page_size, stop)])
            child = node.children.find(rest) if len(rest) == self._page_size * TOKEN_BYTES else None
            if child is None:
                break
            node, start = child, start + self._page_size
            pages.append(node.page)
        partial, common = node.children.nearest(rest)
        if partial is None:
            return Match(pages, start, last=node)
        return Match(pages, start + common, partial.page, common, last=node)

    def _resume(self, known: Match | None, stop: int) -> tuple[_Node, list[int]]:
        """Return where an earlier match ended, and its pages, if they are still cached."""
        if known is None or known.last is None or self._nodes[known.last.page] is not known.last:
            return self._root, []
        if len(known.pages) * self._page_size > stop:
            return self._root, []
        return known.last, [*known.pages]

    def hold(self, match: Match) -> None:
        """Retain a match's pages for the caller.

        The caller releases the partial page once its copy is planned, the full ones when it is
        done with them.
        """
        self._pages.retain(match.held_pages)

    def count(self, match: Match, group: str | None = None, *, is_resumed: bool = False) -> None:
        """Note that a request of a group goes on from a match it holds.

        One that was preempted and resumes has used these pages before: that is no reuse.
        """
        path = [self._node(page) for page in match.pages]
        partial = None if match.partial_page is None else self._node(match.partial_page)
        self._share(path if partial is None else [*path, partial], group)
        if not is_resumed:
            self._policy.hit([self._root, *path], partial)

    def insert(
        self,
        token_ids: Ids[int],
        num_computed: int,
        pages: MutableSequence[int],
        *,
        group: str | None = None,
    ) -> None:
        """Register a sequence's pages for its first `num_computed` tokens.

        May be called as often as the sequence grows; only what is new is looked at. A full page
        whose tokens are in the tree under another page is replaced by that one in `pages`, and
        released: equal prefixes are stored once. The sequence may go on writing to its last page
        behind the tokens registered.
        """
        num_full = num_computed // self._page_size
        node, first = self._deepest(pages, num_full)
        for i in range(first, num_full):
            start = i * self._page_size
            tokens = encode(token_ids[start : start + self._page_size])
            child = node.children.find(tokens)
            if child is None:
                child = self._attach(node, tokens, pages[i], group)
            elif child.page != pages[i]:
                self._pages.retain([child.page])
                self._pages.release([pages[i]])
                pages[i] = child.page
                self._share([child], group)
            node = child
        tail = encode(token_ids[num_full * self._page_size : num_computed])
        if tail and node.children.nearest(tail)[1] * TOKEN_BYTES < len(tail):
            self._attach(node, tail, pages[num_full], group)

    def make_room(self, num_pages: int) -> bool:
        """Evict until `num_pages` pages are free; return False, evicting none, if that is too many.

        Pages that a sequence holds and pinned ones are never touched.
        """
        if self._pages.num_free + self._pages.num_idle < num_pages:
            return False
        while self._pages.num_free < num_pages:
            node = self._policy.take()
            assert isinstance(node, _Node)
            # One that is held again or continued again is offered again when that ends.
            if self._is_evictable(node):
                self._evict_run(node, num_pages)
        return True

    @property
    def num_pinned(self) -> int:
        """Pages kept by `pin`."""
        return len({page for pages in self._pinned.values() for page in pages})

    def pin(self, token_ids: Ids[int]) -> int:
        """Keep the cached part of a prefix from eviction until `unpin`; return its tokens."""
        key, match = encode(token_ids), self.match(token_ids)
        if key not in self._pinned:
            self._pages.retain(match.held_pages)
            self._pinned[key] = match.held_pages
            self._share(map(self._node, match.held_pages), None)
        return match.num_tokens

    def unpin(self, token_ids: Ids[int]) -> None:
        """Undo `pin` of the same tokens."""
        self._pages.release(self._pinned.pop(encode(token_ids)))

    def drop_group(self, group: str) -> int:
        """Forget the pages that only this group has used; return how many.

        Those that a running sequence holds stay its own until it releases them.
        """
        nodes = sorted(self._groups.get(group, ()), key=lambda node: -node.depth)
        for node in nodes:
            self._remove(node)
            assert node.parent is not None
            self._offer(node.parent)
        return len(nodes)

    def forget(self, token_ids: Ids[int], start: int) -> None:
        """Take the pages with a prefix's tokens from `start` on out of the tree.

        Pages that other sequences' prefixes continue stay, and pinned ones.
        """
        for page in reversed(self.match(token_ids).held_pages):
            node = self._node(page)
            first = node.depth * self._page_size
            tokens = encode(token_ids[first:])[: len(node.tokens)]
            is_reused = first + len(node.tokens) // TOKEN_BYTES <= start
            if node.children or tokens != node.tokens or is_reused or self._ends_pin(node):
                return
            self._remove(node)
            assert node.parent is not None
            self._offer(node.parent)

    def page_hash(self, page: int) -> bytes:
        """Return the hash of the prefix that ends with a page of the tree."""
        return self._node(page).prefix_hash()

    def deepest_first(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Iterate over what `on_evict` would be told if all pages were evicted."""
        for node in sorted(filter(None, self._nodes), key=lambda node: -node.depth):
            assert node.parent is not None
            yield node.page, node.parent.prefix_hash(), node.tokens

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Iterate over (page, encoded tokens)."""
        return ((node.page, node.tokens) for node in self._nodes if node is not None)

    def _node(self, page: int) -> _Node:
        node = self._nodes[page]
        assert node is not None, f"page {page} is not in the tree"
        return node

    def _deepest(self, pages: Ids[int], num_full: int) -> tuple[_Node, int]:
        """Return the last node of a sequence's full pages, and how many it accounts for."""
        full = self._page_size * TOKEN_BYTES
        for i in range(num_full, 0, -1):
            node = self._nodes[pages[i - 1]]
            if node is not None and len(node.tokens) == full:
                return node, i
        return self._root, 0

    def _attach(self, parent: _Node, tokens: bytes, page: int, group: str | None) -> _Node:
        """Add a page below `parent`; it takes the place of a tail that it continues."""
        tail = self._nodes[page]
        if tail is None:
            before = parent.children.before(tokens)
            tail = before if before is not None and tokens.startswith(before.tokens) else None
        node = _Node(parent, tokens, page, group)
        if tail is not None and (tail.page == page or not self._ends_pin(tail)):
            self._policy.replaced(tail, node, parent)
            self._remove(tail)
        else:
            self._policy.inserted(node, parent)
        parent.children.add(node)
        self._nodes[page] = node
        self._pages.cache(page)
        if group is not None:
            self._groups.setdefault(group, set()).add(node)
        return node

    def _remove(self, node: _Node, *, evicted: bool = False) -> None:
        """Take a leaf out of the tree."""
        assert node.parent is not None and not node.children
        self._policy.removed(node, evicted=evicted)
        node.parent.children.remove(node)
        self._nodes[node.page] = None
        self._disown(node)
        self._pages.uncache(node.page)

    def _evict_run(self, node: _Node, num_pages: int) -> None:
        """Evict the page of lowest rating, and those above it as long as they rate no higher."""
        lowest = node.rating
        while True:
            assert node.parent is not None
            if self._on_evict is not None:
                self._on_evict(node.page, node.parent.prefix_hash(), node.tokens)
            self._remove(node, evicted=True)
            self.num_evicted += 1
            node = node.parent
            if not self._is_evictable(node):
                return
            if self._pages.num_free >= num_pages or self._policy.rate(node) > lowest:
                self._policy.offer(node)
                return

    def _on_idle(self, page: int) -> None:
        node = self._nodes[page]
        if node is not None:
            self._offer(node)

    def _offer(self, node: _Node) -> None:
        if self._is_evictable(node):
            self._policy.offer(node)

    def _is_evictable(self, node: _Node) -> bool:
        return not node.children and self._pages.is_idle(node.page)

    def _ends_pin(self, node: _Node) -> bool:
        return any(pages[-1:] == [node.page] for pages in self._pinned.values())

    def _share(self, nodes: Iterable[_Node], group: str | None) -> None:
        """Note that a group uses nodes: they no longer belong to another one alone."""
        for node in nodes:
            if node.group != group:
                self._disown(node)

    def _disown(self, node: _Node) -> None:
        if node.group is not None:
            members = self._groups[node.group]
            members.remove(node)
            if not members:
                del self._groups[node.group]
            node.group = None
