"""Below the device: which prefixes lie in host memory, and which pages move in a step.

Rank 0 only, and bookkeeping only. A page that is evicted from the device gets a slot of host
memory, and is copied back when a request begins with its prefix. The ranks move the data, each its
own shard, as the step plan tells them: pages out to slots, then copies between pages, then slots
back to pages, then the model. Two rules make that order right: a page that goes out can come back
with the next plan at the earliest, and a slot that is read in a plan is not written in it.

Only full pages are kept; the partial page at the end of a sequence is cheap to compute again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match, chain_hashes, encode

# Hashes of the prefixes that end with each of a page's units of 64 positions: they do not depend
# on the page size, and so not on the world. The last one names the page.
PageKey = tuple[bytes, ...]


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
    """

    offload: list[tuple[int, int]] = field(default_factory=list)
    restore: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.offload or self.restore)


class Tiers:
    """The prefixes in host memory; what was not used for the longest time gives way.

    Args:
        num_slots: pages that fit.
        page_size: positions of a page.
    """

    def __init__(self, num_slots: int, page_size: int) -> None:
        self._page_size = page_size
        self._free = list(range(num_slots - 1, -1, -1))
        # Oldest first. The ends of prefixes are older than their beginnings, and go first.
        self._slots: OrderedDict[PageKey, int] = OrderedDict()
        self._keys: list[PageKey] = [()] * num_slots
        # What the plan in the making writes to host memory, and what it reads from there.
        self._leaving: dict[PageKey, int] = {}
        self._held: set[int] = set()
        self._moves = Moves()
        self.num_offloaded = self.num_restored = 0

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
        """Continue a match of the tree in host memory.

        Args:
            match: what the device holds.
            keys: the full pages that may be reused.
        """
        slots = []
        for key in keys[len(match.pages) :]:
            if key not in self._slots:
                break
            slots.append(self._slots[key])
        if not slots:
            return match
        num_tokens = (len(match.pages) + len(slots)) * self._page_size
        return Match(match.pages, num_tokens, host_slots=tuple(slots))

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

    def draw(self) -> Moves:
        """Return what the plan in the making moves, and begin the next one."""
        moves, self._moves = self._moves, Moves()
        self._slots.update(self._leaving)
        self._leaving.clear()
        self._held.clear()
        return moves

    def _take_slot(self) -> int | None:
        """Return a slot to write to; None if the plan reads them all."""
        if self._free:
            return self._free.pop()
        oldest = next((key for key, slot in self._slots.items() if slot not in self._held), None)
        return None if oldest is None else self._slots.pop(oldest)
