"""Index keys of sequences in scattered pages; keys that were never written are poison."""

import torch
from torch import Tensor

from dsv3_kernels import PageTables, Paging
from dsv3_kernels.index.index_cache import IndexCache, index_key_bytes

FORMS = (torch.float32, torch.bfloat16, torch.uint8)
# Bytes whose e4m3, bfloat16 and float32 values are NaN.
_POISON = 0xFF


def empty_cache(pages: int, dim: int, form: torch.dtype, slots_per_page: int) -> IndexCache:
    """Return a cache of poison that does not begin where its memory does."""
    width = index_key_bytes(dim) if form == torch.uint8 else dim
    memory = torch.full(((pages + 3) * slots_per_page * width * form.itemsize,), _POISON)
    memory = memory.to(torch.uint8).view(form).view(-1, width)
    return IndexCache(memory[3 * slots_per_page :], slots_per_page)


def scatter_keys(
    keys: list[Tensor], query_pos_BQ: Tensor, paging: Paging, form: torch.dtype
) -> tuple[IndexCache, PageTables]:
    """Return a rank's cache with the keys [n, I] of sequences, and their tables.

    Page 0 fills up tables, and is poison like all slots without a key.
    """
    sizes = [-(-len(key) // paging.page_size) for key in keys]
    pages = (torch.randperm(sum(sizes) + 2) + 1).tolist()
    cache = empty_cache(len(pages) + 1, keys[0].shape[1], form, paging.slots_per_page)
    page_BG = torch.zeros(len(keys), max(sizes) + 2, dtype=torch.int32)
    for b, (key_SI, size) in enumerate(zip(keys, sizes, strict=True)):
        page_BG[b, :size] = torch.tensor([pages.pop() for _ in range(size)], dtype=torch.int32)
        position = torch.arange(len(key_SI))[paging.shard :: paging.shards]
        in_page = position % paging.page_size // paging.shards
        slot = page_BG[b, position // paging.page_size] * paging.slots_per_page + in_page
        cache.write(slot, key_SI[position])
    return cache, PageTables(page_BG, query_pos_BQ, paging)
