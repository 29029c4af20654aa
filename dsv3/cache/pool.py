"""Device memory of the KV cache on one rank: a tensor of slots per plane and layer."""

import math

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.layout import CacheLayout, Plane
from dsv3.distributed.collectives import Collectives
from dsv3_kernels import IndexCache, pack_latent, unpack_latent, write_slots

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


class CachePool:
    """The slots of all planes and layers. The memory is zeroed: slots never written are finite.

    Attributes:
        planes: a tensor per plane, [its layers, num_pages * slots_per_page, width] in the storage
            dtype. FP8 is stored as bytes: dtype uint8, width `entry_bytes`.
    """

    def __init__(
        self, layout: CacheLayout, num_pages: int, device: torch.device, tp: Collectives
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.tp = tp
        self.planes = tuple(self._allocate(plane, device) for plane in layout.planes)
        self._pages = [x.view(len(x), num_pages, -1) for x in self.planes]
        self._layers = [self._layer(i) for i in layout.main.layers]

    def _allocate(self, plane: Plane, device: torch.device) -> Tensor:
        dtype = _DTYPES[plane.dtype]
        num_slots = self.num_pages * self.layout.paging.slots_per_page
        width = plane.entry_bytes // dtype.itemsize
        return _zeros((len(plane.layers), num_slots, width), dtype, device)

    @property
    def device(self) -> torch.device:
        """Device of the memory."""
        return self.planes[0].device

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def num_usable_pages(self) -> int:
        """Pages that can be allocated: all but the null page."""
        return self.num_pages - 1

    def copy_pages(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy whole pages; all sources are read before any target is written."""
        for pages in self._pages:
            pages[:, target_N] = pages[:, source_N]

    def read_pages(self, page_N: Tensor) -> Tensor:
        """Return a copy of whole pages, [N, page_bytes] uint8."""
        planes = [x[:, page_N].transpose(0, 1).flatten(1).view(torch.uint8) for x in self._pages]
        return planes[0] if len(planes) == 1 else torch.cat(planes, 1)

    def write_pages(self, page_N: Tensor, data_NX: Tensor) -> None:
        """Overwrite whole pages with data in the format of `read_pages`, [N, page_bytes]."""
        sizes = [x[:, 0].nbytes for x in self._pages]
        for pages, data in zip(self._pages, data_NX.split(sizes, 1), strict=True):
            # A copy is aligned for every dtype; in the data, a plane may begin at any byte.
            values = data.clone(memory_format=torch.contiguous_format).view(pages.dtype)
            pages[:, page_N] = values.unflatten(1, (len(pages), -1)).transpose(0, 1)

    def layer(self, index: int) -> "LayerCache":
        """Return the cache of one layer, which shares this memory."""
        return self._layers[index]

    def _layer(self, index: int) -> "LayerCache":
        slots = {
            plane.name: x[plane.layers.index(index)]
            for plane, x in zip(self.layout.planes, self.planes, strict=True)
            if index in plane.layers
        }
        return LayerCache(self.layout, slots[self.layout.main.name], slots.get("index"), self.tp)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU, memory that becomes resident only when it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)


class LayerCache:
    """One layer's cache.

    Attributes:
        slots: [slots, width] of the main plane; the methods read and write its entries.
        index: the layer's index keys; None without an indexer.
    """

    def __init__(
        self, layout: CacheLayout, slots: Tensor, index_slots: Tensor | None, tp: Collectives
    ) -> None:
        self.layout = layout
        self.slots = slots
        self.index: IndexCache | None = None
        if index_slots is not None:
            self.index = IndexCache(index_slots, layout.paging.slots_per_page)
        self._plane = layout.main
        self._tp = tp

    def _store(self, entry_TX: Tensor) -> Tensor:
        if self._plane.dtype == "fp8":
            return pack_latent(entry_TX, self._plane.value_dim)
        return entry_TX.to(self.slots.dtype)

    def _load(self, stored_TY: Tensor, dtype: torch.dtype) -> Tensor:
        if self._plane.dtype == "fp8":
            return unpack_latent(stored_TY, self._plane.value_dim, dtype)
        return stored_TY.to(dtype)

    def write(self, slot_T: Tensor, entry_TX: Tensor) -> None:
        """Store entries, rounded to the storage format, in this rank's slots.

        Args:
            slot_T: [T] int64; entries with slot -1 are not stored.
            entry_TX: [T, X], X = the width of the plane.
        """
        write_slots(self.slots, slot_T, self._store(entry_TX))

    def round(self, entry_TX: Tensor) -> Tensor:
        """Return entries [T, X] rounded to the storage format, in their own dtype.

        A chunk attends to its own keys as the cache rounds them, so that its output does not
        depend on the chunk boundaries.
        """
        if entry_TX.dtype == self.slots.dtype:
            return entry_TX
        return self._load(self._store(entry_TX), entry_TX.dtype)

    def gather(self, page_G: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Return a sequence's entries of all ranks in position order.

        A collective if positions are sharded; entries are sent in the storage format.

        Args:
            page_G: [G] int64 consecutive pages of the sequence.
            num_tokens: positions to return, from the first position of the first page on.
            dtype: of the result.

        Returns:
            [num_tokens, width].
        """
        paging = self.layout.paging
        pages = self.slots.view(-1, paging.slots_per_page, self.slots.shape[-1])[page_G]
        local = pages.flatten(0, 1)
        if paging.shards > 1:
            # Local slot j of rank r is position j * shards + r.
            local = self._tp.all_gather(local).transpose(0, 1).flatten(0, 1)
        return self._load(local[:num_tokens], dtype)
