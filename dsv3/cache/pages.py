"""Host-side bookkeeping of pages: who holds them. Pages are numbers; nothing here touches data."""

from dsv3.cache.layout import NULL_PAGE


class PageAllocator:
    """Hands out pages 1 .. num_pages - 1, each shared by as many holders as retain it."""

    def __init__(self, num_pages: int) -> None:
        # Popped from the end: low page numbers first, so that a lightly used pool stays compact.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._holders = [0] * num_pages
        self.num_pages = num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one holder. The caller checks `num_free` first."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: list[int]) -> None:
        """Add a holder to pages that are in use."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drop one holder of each page; pages without holders become free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} released twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
