"""The host-memory tier of one rank: offloads its shard of cached pages and restores it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv3.cache.pool import CachePool

# Pages per transfer; a long prompt may evict or restore thousands.
_BLOCK = 64


class HostPool:
    """Pages in host memory, [pages, page_bytes] uint8.

    With CUDA the memory is pinned and transfers use a separate stream. Pages to offload are first
    gathered on the compute stream, so that the step that overwrites them does not wait for the
    bus. For pages to restore, the compute stream waits, not the host.

    Args:
        cache: the device's pages.
        num_pages: capacity.
    """

    def __init__(self, cache: CachePool, num_pages: int) -> None:
        self._cache = cache
        self.device = cache.device
        is_cuda = self.device.type == "cuda"
        shape = (num_pages, cache.layout.page_bytes)
        self.pages = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._stream = torch.cuda.Stream(self.device) if is_cuda else None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return self.pages.nbytes

    def offload(self, page_N: Tensor, host_N: Tensor) -> None:
        """Copy pages [N] of the device to pages [N] of the host."""
        for pages, host in self._blocks(page_N, host_N):
            data_NX = self._cache.read_pages(pages.to(self.device))
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
                data_NX.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                for data_X, i in zip(data_NX, host.tolist(), strict=True):
                    self.pages[i].copy_(data_X, non_blocking=True)

    def restore(self, host_N: Tensor, page_N: Tensor) -> None:
        """Copy pages [N] of the host to pages [N] of the device."""
        for host, pages in self._blocks(host_N, page_N):
            with torch.cuda.stream(self._stream):
                data = [self.pages[i].to(self.device, non_blocking=True) for i in host.tolist()]
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
                for data_X in data:
                    data_X.record_stream(torch.cuda.current_stream())
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
