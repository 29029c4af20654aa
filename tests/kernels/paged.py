"""Sequences in the scattered pages of a cache; entries that were never written are poison."""

import math

import torch
from torch import Tensor

from dsv3_kernels import Paging


def scatter(
    entries: list[Tensor], paging: Paging, spare: int = 1, order_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a rank's cache [slots, X] and page tables [B, G] of sequences [n, X].

    NaN is in every slot but those of a position that the rank holds, and of the null page, which
    fills up tables that are `spare` pages wider than needed.
    """
    sizes = [-(-len(e) // paging.page_size) for e in entries]
    generator = torch.Generator().manual_seed(order_seed)
    free = (torch.randperm(sum(sizes) + 2, generator=generator) + 1).tolist()
    cache = torch.full(((len(free) + 1) * paging.slots_per_page, entries[0].shape[1]), math.nan)
    cache[: paging.slots_per_page] = 0.0
    page_BG = torch.zeros(len(entries), max(sizes) + spare, dtype=torch.int32)
    for b, (entry_SX, size) in enumerate(zip(entries, sizes, strict=True)):
        pages = [free.pop() for _ in range(size)]
        page_BG[b, :size] = torch.tensor(pages, dtype=torch.int32)
        for p in range(paging.shard, len(entry_SX), paging.shards):
            page, in_page = pages[p // paging.page_size], p % paging.page_size
            cache[page * paging.slots_per_page + in_page // paging.shards] = entry_SX[p]
    return cache, page_BG
