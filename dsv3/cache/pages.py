"""Reference counts of pages. Pages are numbers; nothing here touches data.

A page is free (no holder), in use (held by a sequence), or idle: held by the prefix tree alone, so
its contents can be reused, and it can be evicted.
"""

from collections.abc import Callable, Iterable

from dsv3.cache.layout import NULL_PAGE


class PageAllocator:
    """Allocator of pages 1 .. num_pages - 1 with reference counts; page 0 is the null page.

    Attributes:
        num_pages: pages that can be allocated: one less than the argument.
        num_idle: pages held by the prefix tree alone.
        num_shared: pages held by several sequences.
        on_idle: called with a page whenever it becomes idle.
    """

    def __init__(self, num_pages: int) -> None:
        # Popped from the end: low page numbers first, so that a lightly used pool stays compact.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._holders = [0] * num_pages
        self._cached = bytearray(num_pages)
        self.num_pages = num_pages - 1
        self.num_idle = self.num_shared = 0
        self.on_idle: Callable[[int], None] | None = None

    @property
    def num_free(self) -> int:
        """Pages without a holder."""
        return len(self._free)

    def is_idle(self, page: int) -> bool:
        """Return True if a page is held by the prefix tree alone."""
        return self._holders[page] == 1 and self._cached[page] == 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` free pages, each with one holder. The caller checks `num_free` first."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that are not free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            if self._holders[page] == self._cached[page]:
                self.num_idle -= 1
            self._holders[page] += 1
            self.num_shared += self._holders[page] - self._cached[page] == 2

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder of each page; pages without holders become free."""
        for page in pages:
            assert self._holders[page] > self._cached[page], f"page {page} released twice"
            self.num_shared -= self._holders[page] - self._cached[page] == 2
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
            elif self._holders[page] == self._cached[page]:
                self.num_idle += 1
                if self.on_idle is not None:
                    self.on_idle(page)

    def cache(self, page: int) -> None:
        """Make the prefix tree a holder of a page that a sequence holds."""
        assert self._holders[page] > 0 and not self._cached[page], f"page {page}"
        self._cached[page] = 1
        self._holders[page] += 1

    def uncache(self, page: int) -> None:
        """Remove the prefix tree from the holders of a page; an idle page becomes free."""
        assert self._cached[page], f"page {page} is not in the prefix tree"
        if self._holders[page] == 1:
            self.num_idle -= 1
            self._free.append(page)
        self._cached[page] = 0
        self._holders[page] -= 1
