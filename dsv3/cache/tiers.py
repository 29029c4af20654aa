"""Below the device: which prefixes lie in host memory or on disk, and what moves in a step.

Rank 0 only, and bookkeeping only. A page that is evicted from the device gets a slot of host
memory, and is copied back when a request begins with its prefix. The ranks move the data, each its
own shard, as the step plan tells them: pages out to slots, then copies between pages, then slots
back to pages, then the model. Two rules make that order right: a page that goes out can come back
with the next plan at the earliest, and a slot that is read in a plan is not written in it.

What gives way in host memory may go on to disk. A page comes back from there into a slot that is
nobody's until all ranks have read their part of it; a rank may find its part damaged.

Only full pages are kept; the partial page at the end of a sequence is cheap to compute again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dsv3.cache.disk_index import DiskIndex
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, PrefixTree, chain_hashes, encode

# Hashes of the prefixes that end with each of a page's units of 64 positions: they do not depend
# on the page size, and so not on the world. The last one names the page.
PageKey = tuple[bytes, ...]
# How long a plan that computes nothing waits for the disk, so that idling costs little.
_IDLE_MS = 20
# Pages that one plan saves at the end.
_SAVE_BATCH = 16


def extend_keys(keys: list[PageKey], token_ids: list[int], num_pages: int, page_size: int) -> None:
    """Add the keys of a sequence's full pages until there are `num_pages`."""
    for i in range(len(keys), num_pages):
        tokens = encode(token_ids[i * page_size : (i + 1) * page_size])
        keys.append(tuple(chain_hashes(keys[-1][-1] if keys else b"", tokens)))


@dataclass(slots=True)
class Moves:
    """What the ranks shall move in a step.

    Attributes:
        offload: (page, host slot).
        restore: (host slot, page).
        store: (host slot, name) of a page to write to disk.
        fetch: (host slot, name) of a page to read from disk.
        settle: milliseconds to wait, and slots of fetched pages to agree on; or nothing.
    """

    offload: list[tuple[int, int]] = field(default_factory=list)
    restore: list[tuple[int, int]] = field(default_factory=list)
    store: list[tuple[int, PageKey]] = field(default_factory=list)
    fetch: list[tuple[int, PageKey]] = field(default_factory=list)
    settle: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.offload or self.restore or self.store or self.fetch or self.settle)


class Tiers:
    """The prefixes in host memory; what was not used for the longest time gives way.

    Args:
        num_slots: pages that fit.
        page_size: positions of a page.
        disk: takes what gives way; None loses it.
    """

    def __init__(self, num_slots: int, page_size: int, disk: DiskIndex | None = None) -> None:
        self._page_size, self._disk = page_size, disk
        self._free = list(range(num_slots - 1, -1, -1))
        # Oldest first. The ends of prefixes are older than their beginnings, and go first.
        self._slots: OrderedDict[PageKey, int] = OrderedDict()
        self._keys: list[PageKey] = [()] * num_slots
        # Being read from disk: nobody's until the ranks agree that they have it.
        self._fetching: dict[PageKey, int] = {}
        # What the plan in the making writes to host memory, and what it reads from there.
        self._leaving: dict[PageKey, int] = {}
        self._held: set[int] = set()
        self._moves = Moves()
        self.num_offloaded = self.num_restored = self.num_fetched = 0

    def offload(self, page: int, parent: bytes, tokens: bytes) -> None:
        """Keep a page that the device is about to lose; an `on_evict` of the prefix tree."""
        if len(tokens) < len(encode([0])) * self._page_size:
            return
        key = tuple(chain_hashes(parent, tokens))
        if key in self._slots:
            self._slots.move_to_end(key)
            return
        slot = self._take_slot()
        if slot is None:
            return
        self._leaving[key], self._keys[slot] = slot, key
        self._moves.offload.append((page, slot))
        self.num_offloaded += 1

    def extend(self, match: Match, keys: Sequence[PageKey]) -> Match:
        """Continue a match of the tree in host memory, and look for what follows on disk.

        Args:
            match: what the device holds.
            keys: the full pages that may be reused.
        """
        first = last = len(match.pages)
        while last < len(keys) and keys[last] in self._slots:
            last += 1
        slots = tuple(self._slots[key] for key in keys[first:last])
        stop = last
        while stop < len(keys) and self._is_on_disk(keys[stop]):
            stop += 1
        on_disk = tuple(keys[last:stop])
        if slots:
            match = Match(match.pages, last * self._page_size)
        return replace(match, host_slots=slots, on_disk=on_disk) if slots or on_disk else match

    def fetch(self, match: Match) -> bool:
        """Send for the pages of a match that are on disk; tell whether the first is on its way."""
        self.hold(match.host_slots)
        for key in match.on_disk:
            if key in self._fetching:
                continue
            slot = self._take_slot()
            if slot is None:
                break
            self._fetching[key], self._keys[slot] = slot, key
            self._moves.fetch.append((slot, key))
        return match.on_disk[0] in self._fetching

    def settle(self, outcomes: dict[int, bool]) -> None:
        """Note which fetched slots all ranks have (True), and which some rank could not read."""
        for slot, is_good in reversed(outcomes.items()):
            key = self._keys[slot]
            del self._fetching[key]
            assert self._disk is not None
            if is_good and key not in self._slots:
                self._slots[key] = slot
                self._disk.touch(key)
                self.num_fetched += 1
                continue
            self._free.append(slot)
            if not is_good:
                self._disk.discard(key)

    def hold(self, slots: Sequence[int]) -> None:
        """Keep slots as they are until the plan is drawn, and count the use."""
        self._held.update(slots)
        for slot in reversed(slots):
            self._slots.move_to_end(self._keys[slot])

    def restore(self, slots: Sequence[int], pages: PageAllocator) -> list[int]:
        """Return new pages that slots are copied back to."""
        taken = pages.allocate(len(slots))
        self._moves.restore += zip(slots, taken, strict=True)
        self.num_restored += len(taken)
        return taken

    def draw(self, is_idle: bool = False) -> Moves:
        """Return what the plan in the making moves, and begin the next one.

        Args:
            is_idle: the plan computes nothing, so it may wait a little for the disk.
        """
        moves, self._moves = self._moves, Moves()
        if self._disk is not None:
            self._disk.note_written()
            slots = self._fetching.values()
            wanted = [slot for slot in slots if is_idle or self._disk.is_read(slot)]
            if wanted:
                moves.settle = [_IDLE_MS if is_idle else 0, *wanted]
        self._slots.update(self._leaving)
        self._leaving.clear()
        self._held.clear()
        return moves

    def save(self, tree: PrefixTree) -> Iterator[Moves]:
        """Write what is cached to disk; yields what must move, plan by plan."""
        if self._disk is None:
            return
        batch = min(_SAVE_BATCH, len(self._keys))
        for page, parent, tokens in tree.deepest_first():
            if tuple(chain_hashes(parent, tokens)) not in self._disk:
                self.offload(page, parent, tokens)
            if len(self._moves.offload) == batch:
                yield self.draw()
                self._disk.catch_up()
        yield self.draw()
        for key, slot in list(self._slots.items()):
            self._spill(key, slot)
            if len(self._moves.store) == batch:
                yield self.draw()
                self._disk.catch_up()
        yield self.draw()
        self._disk.catch_up()

    def counts(self) -> tuple[int, int, int, int, int]:
        """Return pages offloaded, restored and fetched so far, files written, bytes on disk."""
        written, size = 0, 0
        if self._disk is not None:
            written, size = self._disk.num_written, self._disk.num_bytes
        return self.num_offloaded, self.num_restored, self.num_fetched, written, size

    def _is_on_disk(self, key: PageKey) -> bool:
        return key in self._fetching or (self._disk is not None and key in self._disk)

    def _spill(self, key: PageKey, slot: int) -> None:
        """Write a page to disk unless it is there."""
        if self._disk is not None and self._disk.accept(key):
            self._moves.store.append((slot, key))

    def _take_slot(self) -> int | None:
        """Return a slot to write to; None if the plan reads them all."""
        if self._free:
            return self._free.pop()
        oldest = next((key for key, slot in self._slots.items() if slot not in self._held), None)
        if oldest is None:
            return None
        slot = self._slots.pop(oldest)
        self._spill(oldest, slot)
        return slot
