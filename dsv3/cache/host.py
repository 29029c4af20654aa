"""The host-memory tier of one rank: offloads its shard of cached pages and restores it."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.cache.pool import CachePool

# Pages per transfer; a long prompt may evict or restore thousands.
_BLOCK = 64


class HostPool:
    """Pages in host memory, [host slots, layers, slots_per_page * width] in the storage dtype.

    With CUDA the memory is pinned and transfers use a separate stream. Pages to offload are first
    gathered on the compute stream, so that the step that overwrites them does not wait for the
    bus. For pages to restore, the compute stream waits, not the host.

    Args:
        cache: the device's pages.
        num_slots: capacity in pages.
    """

    def __init__(self, cache: CachePool, num_slots: int) -> None:
        self._cache = cache
        self.device = cache.slots.device
        is_cuda = self.device.type == "cuda"
        shape = (num_slots, *cache.read_pages(torch.zeros(1, dtype=torch.int64)).shape[1:])
        self.slots = torch.empty(shape, dtype=cache.slots.dtype, pin_memory=is_cuda)
        self._stream = torch.cuda.Stream(self.device) if is_cuda else None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return self.slots.numel() * self.slots.element_size()

    def by_entry(self) -> NDArray[np.uint8]:
        """Return a view of the memory, [host slots, layers, slots of a page, entry bytes] uint8."""
        entry_bytes = self._cache.layout.entry_bytes
        return self.slots.view(torch.uint8).unflatten(-1, (-1, entry_bytes)).numpy()

    def offload(self, page_N: Tensor, slot_N: Tensor) -> None:
        """Copy pages [N] to host slots [N]."""
        for pages, slots in self._blocks(page_N, slot_N):
            data_NLX = self._cache.read_pages(pages.to(self.device)).contiguous()
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
                data_NLX.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                for data_LX, slot in zip(data_NLX, slots.tolist(), strict=True):
                    self.slots[slot].copy_(data_LX, non_blocking=True)

    def restore(self, slot_N: Tensor, page_N: Tensor) -> None:
        """Copy host slots [N] to pages [N] of the device."""
        for slots, pages in self._blocks(slot_N, page_N):
            with torch.cuda.stream(self._stream):
                data = [self.slots[i].to(self.device, non_blocking=True) for i in slots.tolist()]
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
                for data_LX in data:
                    data_LX.record_stream(torch.cuda.current_stream())
            self._cache.write_pages(pages.to(self.device), torch.stack(data))

    def _blocks(self, source_N: Tensor, target_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the transfer in blocks, to bound the device memory of its intermediate copies."""
        blocks = zip(source_N.split(_BLOCK), target_N.split(_BLOCK), strict=True)
        for number, block in enumerate(blocks):
            if number and self._stream is not None:
                torch.cuda.synchronize(self.device)
            yield block

    def synchronize(self) -> None:
        """Wait until all transfers are complete."""
        if self._stream is not None:
            self._stream.synchronize()
