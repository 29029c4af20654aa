"""Device memory of the KV cache on one rank: a tensor of slots per layer."""

import math

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.layout import CacheLayout
from dsv3.distributed.collectives import Collectives
from dsv3_kernels import pack_latent, unpack_latent, write_slots

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


class CachePool:
    """All layers' slots, [layers, num_pages * slots_per_page, width] in the storage dtype.

    The packed FP8 format is stored as bytes: dtype uint8, width `entry_bytes`. The memory is
    zeroed: slots never written are finite and, on a CPU, not resident.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_layers: int,
        num_pages: int,
        device: torch.device,
        tp: Collectives,
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.tp = tp
        dtype = _DTYPES[layout.dtype]
        num_slots = num_pages * layout.slots_per_page
        width = layout.entry_bytes // dtype.itemsize
        self.slots = _zeros((num_layers, num_slots, width), dtype, device)
        self._pages = self.slots.view(num_layers, num_pages, -1)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return self.slots.numel() * self.slots.element_size()

    @property
    def num_usable_pages(self) -> int:
        """Pages that can be allocated: all but the null page."""
        return self.num_pages - 1

    def copy_pages(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy whole pages in all layers; all sources are read before any target is written."""
        self._pages[:, target_N] = self._pages[:, source_N]

    def read_pages(self, page_N: Tensor) -> Tensor:
        """Return a copy of whole pages, [N, layers, X] as stored; X = slots_per_page * width."""
        return self._pages[:, page_N].transpose(0, 1)

    def write_pages(self, page_N: Tensor, data_NLX: Tensor) -> None:
        """Overwrite whole pages with data in the format of `read_pages`, [N, layers, X]."""
        self._pages[:, page_N] = data_NLX.transpose(0, 1)

    def layer(self, index: int) -> "LayerCache":
        """Return the cache of one layer, which shares this memory."""
        return LayerCache(self.layout, self.slots[index], self.tp)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU, memory that becomes resident only when it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)


class LayerCache:
    """One layer's slots, [slots, width]."""

    def __init__(self, layout: CacheLayout, slots: Tensor, tp: Collectives) -> None:
        self.layout = layout
        self.slots = slots
        self.tp = tp

    def _store(self, entry_TX: Tensor) -> Tensor:
        if self.layout.dtype == "fp8":
            return pack_latent(entry_TX, self.layout.value_dim)
        return entry_TX.to(self.slots.dtype)

    def _load(self, stored_TY: Tensor, dtype: torch.dtype) -> Tensor:
        if self.layout.dtype == "fp8":
            return unpack_latent(stored_TY, self.layout.value_dim, dtype)
        return stored_TY.to(dtype)

    def write(self, slot_T: Tensor, entry_TX: Tensor) -> None:
        """Store entries, rounded to the storage format, in this rank's slots.

        Args:
            slot_T: [T] int64; entries with slot -1 are not stored.
            entry_TX: [T, X], X = `layout.width` values.
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
        layout = self.layout
        pages = self.slots.view(-1, layout.slots_per_page, self.slots.shape[-1])[page_G]
        local = pages.flatten(0, 1)
        if layout.shards > 1:
            # Local slot j of rank r is position j * shards + r.
            local = self.tp.all_gather(local).transpose(0, 1).flatten(0, 1)
        return self._load(local[:num_tokens], dtype)
