"""The cache's memory on one rank: a tensor of slots per layer, written by slot, read by slot."""

import math

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.layout import CacheLayout
from dsv3.distributed.collectives import Collectives
from dsv3_kernels import pack_latent, unpack_latent, write_slots

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


class CachePool:
    """[layers, num_pages * slots_per_page, width] in the storage dtype; bytes for packed FP8.

    Zeroed, so that memory nobody has written yet is finite and, on a CPU, not even resident.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_layers: int,
        num_pages: int,
        device: torch.device,
        tp: Collectives,
    ) -> None:
        self.layout, self.num_pages, self.tp = layout, num_pages, tp
        dtype = _DTYPES[layout.dtype]
        num_slots, width = num_pages * layout.slots_per_page, layout.entry_bytes // dtype.itemsize
        self.slots = _zeros((num_layers, num_slots, width), dtype, device)
        self._pages = self.slots.view(num_layers, num_pages, -1)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return self.slots.numel() * self.slots.element_size()

    @property
    def num_usable_pages(self) -> int:
        """Pages that sequences can hold: all but the null page."""
        return self.num_pages - 1

    def copy_pages(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy whole pages in all layers; all sources are read before any target is written."""
        self._pages[:, target_N] = self._pages[:, source_N]

    def read_pages(self, page_N: Tensor) -> Tensor:
        """Return a copy of whole pages, [N, layers, slots_per_page * width] as stored."""
        return self._pages[:, page_N].transpose(0, 1)

    def write_pages(self, page_N: Tensor, data_NLX: Tensor) -> None:
        """Undo `read_pages`."""
        self._pages[:, page_N] = data_NLX.transpose(0, 1)

    def layer(self, index: int) -> "LayerCache":
        """Return the part of one layer."""
        return LayerCache(self.layout, self.slots[index], self.tp)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU, memory that becomes resident only where it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)


class LayerCache:
    """One layer's slots, [slots, width]."""

    def __init__(self, layout: CacheLayout, slots: Tensor, tp: Collectives) -> None:
        self.layout, self.slots, self.tp = layout, slots, tp

    def _store(self, entry_TX: Tensor) -> Tensor:
        if self.layout.dtype == "fp8":
            return pack_latent(entry_TX, self.layout.value_dim)
        return entry_TX.to(self.slots.dtype)

    def _load(self, stored_TY: Tensor, dtype: torch.dtype) -> Tensor:
        if self.layout.dtype == "fp8":
            return unpack_latent(stored_TY, self.layout.value_dim, dtype)
        return stored_TY.to(dtype)

    def write(self, slot_T: Tensor, entry_TX: Tensor) -> None:
        """Store entries, rounded to the storage format, in this rank's slots; none at slot -1."""
        write_slots(self.slots, slot_T, self._store(entry_TX))

    def round(self, entry_TX: Tensor) -> Tensor:
        """Return entries as they will be read back, in their own dtype.

        A chunk attends to its own keys through the cache format, so that its output does not
        depend on where chunks were cut.
        """
        if entry_TX.dtype == self.slots.dtype:
            return entry_TX
        return self._load(self._store(entry_TX), entry_TX.dtype)

    def gather(self, page_G: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Return a sequence's entries in position order, all ranks' shards together.

        Args:
            page_G: [G] int64 consecutive pages of the sequence.
            num_tokens: positions wanted, from the first of the first page on.
            dtype: of the result.

        Returns:
            [num_tokens, width]. A collective if positions are sharded; entries travel as stored.
        """
        layout = self.layout
        pages = self.slots.view(-1, layout.slots_per_page, self.slots.shape[-1])[page_G]
        local = pages.flatten(0, 1)
        if layout.shards > 1:
            # Local slot j of rank r is position j * shards + r.
            local = self.tp.all_gather(local).transpose(0, 1).flatten(0, 1)
        return self._load(local[:num_tokens], dtype)
