"""Index of the cache tiers below the device: prefixes in host memory and on disk.

Rank 0 only, and bookkeeping only. A page that is evicted from the device is offloaded to a page of
host memory, and restored when a request begins with its prefix. Every rank moves its own shard of
the data, as listed in the step plan: first offloads, then copies between pages, then restores, then
the model runs. Two rules make this order correct: an offloaded page can be restored with the next
plan at the earliest, and a host page that a plan reads is not written by the same plan.

Pages that are evicted from host memory may be stored on disk. A page is fetched from disk into a
host page, which cannot be used until all ranks have read their part. A rank may find its part
damaged.

Only full pages are kept; the partial page at the end of a sequence is cheap to recompute.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dsv3.cache.children import TOKEN_BYTES, encode
from dsv3.cache.disk_index import DiskIndex
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, PrefixTree
from dsv3.cache.prefix_hash import chain_hashes

# Hashes of the prefixes that end with each of a page's units of 64 positions. They do not depend on
# the page size, and so not on the world size. The last one identifies the page.
PageKey = tuple[bytes, ...]
# Milliseconds that a plan without tokens waits for the disk, to limit the rate of such plans.
_IDLE_MS = 20
# Pages that a plan of `Tiers.save` moves.
_SAVE_BATCH = 16


def extend_keys(keys: list[PageKey], token_ids: list[int], num_pages: int, page_size: int) -> None:
    """Append keys of a sequence's full pages to `keys` until it has `num_pages`."""
    for i in range(len(keys), num_pages):
        tokens = encode(token_ids[i * page_size : (i + 1) * page_size])
        keys.append(tuple(chain_hashes(keys[-1][-1] if keys else b"", tokens)))


@dataclass(slots=True)
class Moves:
    """The transfers of a step.

    Attributes:
        offload: (page, host page) pairs.
        restore: (host page, page) pairs.
        store: (host page, key) of each page to write to disk.
        fetch: (host page, key) of each page to begin to read from disk.
        confirm_fetched: milliseconds to wait, then the host pages whose state all ranks report;
            empty if there are none.
    """

    offload: list[tuple[int, int]] = field(default_factory=list)
    restore: list[tuple[int, int]] = field(default_factory=list)
    store: list[tuple[int, PageKey]] = field(default_factory=list)
    fetch: list[tuple[int, PageKey]] = field(default_factory=list)
    confirm_fetched: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.offload or self.restore or self.store or self.fetch or self.confirm_fetched
        )


class Tiers:
    """The pages in host memory, with least-recently-used eviction, and the transfers to plan.

    Args:
        num_host_pages: pages of host memory.
        page_size: positions of a page.
        disk: stores pages evicted from host memory; None drops them.

    Attributes:
        num_offloaded, num_restored, num_fetched: pages so far.
    """

    def __init__(self, num_host_pages: int, page_size: int, disk: DiskIndex | None = None) -> None:
        self._page_size = page_size
        self._disk = disk
        self._free = list(range(num_host_pages - 1, -1, -1))
        # Least recently used first. The end of a prefix is evicted before its beginning.
        self._host_pages: OrderedDict[PageKey, int] = OrderedDict()
        self._keys: list[PageKey] = [()] * num_host_pages
        # Pages being read from disk; not usable until all ranks have them.
        self._fetching: dict[PageKey, int] = {}
        # Pages that the next plan offloads, and host pages that it must not write to.
        self._offloading: dict[PageKey, int] = {}
        self._protected: set[int] = set()
        self._moves = Moves()
        self.num_offloaded = 0
        self.num_restored = 0
        self.num_fetched = 0

    def offload(self, page: int, parent: bytes, tokens: bytes) -> None:
        """Plan to offload a page that is being evicted; the prefix tree's `on_evict`."""
        if len(tokens) < TOKEN_BYTES * self._page_size:
            return
        key = tuple(chain_hashes(parent, tokens))
        if key in self._host_pages:
            self._host_pages.move_to_end(key)
            return
        host_page = self._take_host_page()
        if host_page is None:
            return
        self._offloading[key] = host_page
        self._keys[host_page] = key
        self._moves.offload.append((page, host_page))
        self.num_offloaded += 1

    def extend(self, match: Match, keys: Sequence[PageKey]) -> Match:
        """Return a match of the prefix tree, extended by pages in host memory and on disk.

        Args:
            match: result of the prefix tree.
            keys: keys of all full pages that may be reused.
        """
        host_start = len(match.pages)
        host_stop = host_start
        while host_stop < len(keys) and keys[host_stop] in self._host_pages:
            host_stop += 1
        host_pages = tuple(self._host_pages[key] for key in keys[host_start:host_stop])
        disk_stop = host_stop
        while disk_stop < len(keys) and self._is_on_disk(keys[disk_stop]):
            disk_stop += 1
        on_disk = tuple(keys[host_stop:disk_stop])
        if host_pages:
            match = Match(match.pages, host_stop * self._page_size)
        if host_pages or on_disk:
            match = replace(match, host_pages=host_pages, on_disk=on_disk)
        return match

    def fetch(self, match: Match) -> bool:
        """Plan to read the pages of a match that are on disk.

        Returns True if the first of them is being read; False if host memory has no page for it.
        """
        self.hold(match.host_pages)
        for key in match.on_disk:
            if key in self._fetching:
                continue
            host_page = self._take_host_page()
            if host_page is None:
                break
            self._fetching[key] = host_page
            self._keys[host_page] = key
            self._moves.fetch.append((host_page, key))
        return match.on_disk[0] in self._fetching

    def confirm_fetched(self, outcomes: dict[int, bool]) -> None:
        """Make fetched pages usable, or drop them.

        Args:
            outcomes: by host page, True if all ranks have read their part of the page.
        """
        for host_page, is_good in reversed(outcomes.items()):
            key = self._keys[host_page]
            del self._fetching[key]
            assert self._disk is not None
            if is_good and key not in self._host_pages:
                self._host_pages[key] = host_page
                self._disk.touch(key)
                self.num_fetched += 1
                continue
            self._free.append(host_page)
            if not is_good:
                self._disk.discard(key)

    def hold(self, host_pages: Sequence[int]) -> None:
        """Protect host pages from being overwritten by the next plan, and mark them as used."""
        self._protected.update(host_pages)
        for host_page in reversed(host_pages):
            self._host_pages.move_to_end(self._keys[host_page])

    def restore(self, host_pages: Sequence[int], pages: PageAllocator) -> list[int]:
        """Allocate pages and plan to copy host pages to them; return the pages."""
        restored = pages.allocate(len(host_pages))
        self._moves.restore += zip(host_pages, restored, strict=True)
        self.num_restored += len(restored)
        return restored

    def draw(self, is_idle: bool = False) -> Moves:
        """Return the transfers of the next plan, and begin to collect those of the plan after it.

        Args:
            is_idle: the plan has no tokens, so it may wait a little for the disk.
        """
        moves = self._moves
        self._moves = Moves()
        if self._disk is not None:
            self._disk.note_written()
            fetching = self._fetching.values()
            read = [host_page for host_page in fetching if is_idle or self._disk.is_read(host_page)]
            if read:
                moves.confirm_fetched = [_IDLE_MS if is_idle else 0, *read]
        self._host_pages.update(self._offloading)
        self._offloading.clear()
        self._protected.clear()
        return moves

    def save(self, tree: PrefixTree) -> Iterator[Moves]:
        """Write all cached pages to disk; yields the transfers of one plan after the other."""
        if self._disk is None:
            return
        pages_per_plan = min(_SAVE_BATCH, len(self._keys))
        for page, parent, tokens in tree.deepest_first():
            if tuple(chain_hashes(parent, tokens)) not in self._disk:
                self.offload(page, parent, tokens)
            if len(self._moves.offload) == pages_per_plan:
                yield self.draw()
                self._disk.catch_up()
        yield self.draw()
        for key, host_page in list(self._host_pages.items()):
            self._spill(key, host_page)
            if len(self._moves.store) == pages_per_plan:
                yield self.draw()
                self._disk.catch_up()
        yield self.draw()
        self._disk.catch_up()

    @property
    def num_written(self) -> int:
        """Files written to disk so far."""
        return 0 if self._disk is None else self._disk.num_written

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk, those being written included."""
        return 0 if self._disk is None else self._disk.num_bytes

    def _is_on_disk(self, key: PageKey) -> bool:
        return key in self._fetching or (self._disk is not None and key in self._disk)

    def _spill(self, key: PageKey, host_page: int) -> None:
        """Plan to write a page to disk, if the disk index accepts it."""
        if self._disk is not None and self._disk.accept(key):
            self._moves.store.append((host_page, key))

    def _take_host_page(self) -> int | None:
        """Return a host page to write to, evicting its content; None if the plan reads all."""
        if self._free:
            return self._free.pop()
        for key, host_page in self._host_pages.items():
            if host_page not in self._protected:
                del self._host_pages[key]
                self._spill(key, host_page)
                return host_page
        return None
