"""Prefix tree: finds, shares and evicts cached pages by the token ids of their prefixes.

A node is one cached page with its tokens. The path from the root to a node is a prefix. Only full
pages have children; a leaf may be a partial page, the tail of a sequence. A new sequence shares
the full pages of its longest cached prefix, and copies the page after them if that page begins
with the sequence's next tokens.

A holder of a page also holds all pages above it. So below an idle page (held by the tree alone) all
pages are idle, and all idle pages can be evicted, leaves first.
"""

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from dsv3.cache.children import TOKEN_BYTES, Children, encode
from dsv3.cache.eviction import CacheEntry, EvictionPolicy
from dsv3.cache.layout import NULL_PAGE
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix_hash import chain_hash


class _Node(CacheEntry):
    """A cached page in the tree.

    Attributes:
        parent: node of the page before it; None for the root.
        tokens: its encoded tokens.
        page: number of the page.
        conversation: the only conversation that has used the page; None if there are several, or if
            a request without a conversation has used it.
        digest: cached result of `prefix_hash`.
    """

    __slots__ = ("children", "conversation", "digest", "page", "parent", "tokens")

    def __init__(
        self, parent: "_Node | None", tokens: bytes, page: int, conversation: str | None
    ) -> None:
        super().__init__(parent, tokens)
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.conversation = conversation
        self.digest: bytes | None = None
        self.children = Children[_Node]()

    def prefix_hash(self) -> bytes:
        """Return the hash of the prefix that ends with this page; computed once."""
        missing = []
        node = self
        while node.digest is None:
            missing.append(node)
            assert node.parent is not None
            node = node.parent
        digest = node.digest
        for node in reversed(missing):
            digest = chain_hash(digest, node.tokens)
            node.digest = digest
        return digest


@dataclass(frozen=True, slots=True)
class Match:
    """The cached prefix of a query.

    Attributes:
        pages: full pages to share, in order.
        num_tokens: tokens found, including those in the partial page.
        partial_page: page that begins with the tokens found after those of `pages`; must be copied
            before the sequence writes to it. None if there is no such page.
        last: node of the last of `pages`, from which a later look-up continues.
        host_pages: pages of host memory that hold the full pages after `pages`; see tiers.py.
        on_disk: keys of the full pages on disk that follow those; see `tiers.PageKey`.
    """

    pages: list[int]
    num_tokens: int
    partial_page: int | None = None
    last: _Node | None = field(default=None, repr=False, compare=False)
    host_pages: tuple[int, ...] = ()
    on_disk: tuple[tuple[bytes, ...], ...] = ()

    @property
    def held_pages(self) -> list[int]:
        """The pages that `PrefixTree.hold` retains for the caller."""
        return self.pages if self.partial_page is None else [*self.pages, self.partial_page]


class PrefixTree:
    """The tree of cached pages of one data-parallel group.

    Args:
        pages: the allocator the pages come from.
        page_size: positions of a page.
        policy: decides which idle page is evicted first.
        on_evict: called before an evicted page is freed, with the page, the hash of the prefix
            before it, and its encoded tokens.

    Attributes:
        num_evicted: pages evicted so far.
    """

    def __init__(
        self,
        pages: PageAllocator,
        page_size: int,
        policy: EvictionPolicy,
        on_evict: Callable[[int, bytes, bytes], None] | None = None,
    ) -> None:
        self._pages = pages
        self._page_size = page_size
        self._policy = policy
        self._on_evict = on_evict
        self._root = _Node(None, b"", NULL_PAGE, None)
        self._root.digest = b""
        self._nodes: list[_Node | None] = [None] * (pages.num_pages + 1)
        self._conversations: dict[str, set[_Node]] = {}
        self._pinned: dict[bytes, list[int]] = {}
        self.num_evicted = 0
        pages.on_idle = self._on_idle

    def match(
        self, token_ids: Ids[int], limit: int | None = None, known: Match | None = None
    ) -> Match:
        """Find the longest cached prefix of `token_ids`, of at most `limit` tokens.

        A pure look-up. The result is valid until pages are evicted: `hold` it before making room.

        Args:
            token_ids: the query.
            limit: maximal number of tokens; None for all.
            known: an earlier match of the same tokens, from which the look-up continues.
        """
        stop = len(token_ids) if limit is None else min(limit, len(token_ids))
        node, pages = self._resume(known, stop)
        start = len(pages) * self._page_size
        tokens = encode(token_ids[start : min(start + self._page_size, stop)])
        while len(tokens) == self._page_size * TOKEN_BYTES:
            child = node.children.find(tokens)
            if child is None:
                break
            node = child
            pages.append(node.page)
            start += self._page_size
            tokens = encode(token_ids[start : min(start + self._page_size, stop)])
        partial, num_common = node.children.nearest(tokens)
        if partial is None:
            return Match(pages, start, last=node)
        return Match(
            pages,
            num_tokens=start + num_common,
            partial_page=partial.page,
            last=node,
        )

    def _resume(self, known: Match | None, stop: int) -> tuple[_Node, list[int]]:
        """Return the last node and the pages of an earlier match, if it is still valid.

        Else the root and no pages.
        """
        if known is None or known.last is None or self._nodes[known.last.page] is not known.last:
            return self._root, []
        if len(known.pages) * self._page_size > stop:
            return self._root, []
        return known.last, [*known.pages]

    def hold(self, match: Match) -> None:
        """Retain a match's pages for the caller.

        The caller releases the partial page once its copy is planned, the full pages when the
        sequence ends.
        """
        self._pages.retain(match.held_pages)

    def count(
        self, match: Match, conversation: str | None = None, *, is_resumed: bool = False
    ) -> None:
        """Record that a request of a conversation continues a match that it holds.

        A request that resumes after preemption (`is_resumed`) has used these pages before, so this
        does not count as a reuse.
        """
        path = [self._node(page) for page in match.pages]
        partial = None if match.partial_page is None else self._node(match.partial_page)
        self._share(path if partial is None else [*path, partial], conversation)
        if not is_resumed:
            self._policy.hit([self._root, *path], partial)

    def insert(
        self,
        token_ids: Ids[int],
        num_computed: int,
        pages: MutableSequence[int],
        *,
        conversation: str | None = None,
    ) -> None:
        """Register a sequence's pages for its first `num_computed` tokens.

        May be called repeatedly as the sequence grows; only new pages are processed. Equal prefixes
        are stored once: a full page whose tokens are in the tree under another page is released,
        and replaced by that page in `pages`. The sequence may continue to write to its last page
        after the registered tokens.
        """
        num_full = num_computed // self._page_size
        node, first = self._deepest(pages, num_full)
        for i in range(first, num_full):
            start = i * self._page_size
            tokens = encode(token_ids[start : start + self._page_size])
            child = node.children.find(tokens)
            if child is None:
                child = self._attach(node, tokens, pages[i], conversation)
            elif child.page != pages[i]:
                self._pages.retain([child.page])
                self._pages.release([pages[i]])
                pages[i] = child.page
                self._share([child], conversation)
            node = child
        tail = encode(token_ids[num_full * self._page_size : num_computed])
        if tail and node.children.nearest(tail)[1] * TOKEN_BYTES < len(tail):
            self._attach(node, tail, pages[num_full], conversation)

    def make_room(self, num_pages: int) -> bool:
        """Evict idle pages until `num_pages` pages are free.

        Returns False, without evicting, if there are not enough idle pages. Pages held by sequences
        and pinned pages are never evicted.
        """
        if self._pages.num_free + self._pages.num_idle < num_pages:
            return False
        while self._pages.num_free < num_pages:
            node = self._policy.take()
            assert isinstance(node, _Node)
            # A page that is in use again or has children again becomes a candidate later.
            if self._is_evictable(node):
                self._evict_run(node, num_pages)
        return True

    @property
    def num_pinned(self) -> int:
        """Number of pages kept by `pin`."""
        return len({page for pages in self._pinned.values() for page in pages})

    def pin(self, token_ids: Ids[int]) -> int:
        """Protect the cached part of a prefix from eviction; return its number of tokens."""
        key = encode(token_ids)
        match = self.match(token_ids)
        if key not in self._pinned:
            self._pages.retain(match.held_pages)
            self._pinned[key] = match.held_pages
            self._share(map(self._node, match.held_pages), None)
        return match.num_tokens

    def drop_conversation(self, conversation: str) -> int:
        """Remove the pages that only this conversation has used from the tree; return their number.

        A running sequence keeps its pages until it releases them.
        """
        nodes = sorted(self._conversations.get(conversation, ()), key=lambda node: -node.depth)
        for node in nodes:
            self._remove(node)
            assert node.parent is not None
            self._offer(node.parent)
        return len(nodes)

    def forget(self, token_ids: Ids[int], start: int) -> None:
        """Remove the pages with a prefix's tokens from index `start` on from the tree.

        Pinned pages stay, and pages that are part of other cached prefixes.
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

    def deepest_first(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Iterate over all pages as the arguments of `on_evict`, the deepest first."""
        for node in sorted(filter(None, self._nodes), key=lambda node: -node.depth):
            assert node.parent is not None
            yield node.page, node.parent.prefix_hash(), node.tokens

    def _node(self, page: int) -> _Node:
        node = self._nodes[page]
        assert node is not None, f"page {page} is not in the tree"
        return node

    def _deepest(self, pages: Ids[int], num_full: int) -> tuple[_Node, int]:
        """Return the node of a sequence's last full page in the tree, and its number of pages."""
        page_bytes = self._page_size * TOKEN_BYTES
        for i in range(num_full, 0, -1):
            node = self._nodes[pages[i - 1]]
            if node is not None and len(node.tokens) == page_bytes:
                return node, i
        return self._root, 0

    def _attach(self, parent: _Node, tokens: bytes, page: int, conversation: str | None) -> _Node:
        """Add a page below `parent`; it replaces a partial page whose tokens it begins with."""
        tail = self._nodes[page]
        if tail is None:
            before = parent.children.before(tokens)
            tail = before if before is not None and tokens.startswith(before.tokens) else None
        node = _Node(parent, tokens, page, conversation)
        if tail is not None and (tail.page == page or not self._ends_pin(tail)):
            self._policy.replaced(tail, node, parent)
            self._remove(tail)
        else:
            self._policy.inserted(node, parent)
        parent.children.add(node)
        self._nodes[page] = node
        self._pages.cache(page)
        if conversation is not None:
            self._conversations.setdefault(conversation, set()).add(node)
        return node

    def _remove(self, node: _Node, *, evicted: bool = False) -> None:
        """Remove a leaf from the tree."""
        assert node.parent is not None and not node.children
        self._policy.removed(node, evicted=evicted)
        node.parent.children.remove(node)
        self._nodes[node.page] = None
        self._disown(node)
        self._pages.uncache(node.page)

    def _evict_run(self, node: _Node, num_pages: int) -> None:
        """Evict the page of lowest rating, and pages above it while they rate no higher."""
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

    def _share(self, nodes: Iterable[_Node], conversation: str | None) -> None:
        """Record that a conversation uses nodes: those of another conversation become shared."""
        for node in nodes:
            if node.conversation != conversation:
                self._disown(node)

    def _disown(self, node: _Node) -> None:
        if node.conversation is not None:
            members = self._conversations[node.conversation]
            members.remove(node)
            if not members:
                del self._conversations[node.conversation]
            node.conversation = None
