import pytest

from dsv3.cache.pages import PageAllocator


def test_all_pages_except_the_null_page_are_allocated_once() -> None:
    pages = PageAllocator(6)
    assert pages.num_pages == pages.num_free == 5
    assert pages.allocate(2) == [1, 2]
    assert sorted(pages.allocate(3)) == [3, 4, 5]
    assert pages.num_free == 0
    with pytest.raises(AssertionError, match="1 pages wanted, 0 free"):
        pages.allocate(1)
    assert pages.allocate(0) == []


def test_shared_pages_are_freed_by_their_last_holder() -> None:
    pages = PageAllocator(4)
    allocated = pages.allocate(2)
    pages.retain(allocated[:1])
    pages.release(allocated)
    assert pages.num_free == 2
    pages.release(allocated[:1])
    assert pages.num_free == 3
    assert sorted(pages.allocate(3)) == [1, 2, 3]


def test_double_release_and_retaining_free_pages_are_errors() -> None:
    pages = PageAllocator(4)
    allocated = pages.allocate(1)
    pages.release(allocated)
    with pytest.raises(AssertionError, match="released twice"):
        pages.release(allocated)
    with pytest.raises(AssertionError, match="is free"):
        pages.retain(allocated)
