"""Geometry of the paged KV cache: the entries of a position, and the rank that stores them.

A page is `page_size` consecutive positions of one sequence, at every world size. With tokens
sharded, rank r of tp stores the positions p of the page with p mod tp = r; with heads sharded
or nothing sharded, every rank has a slot for each position. So page tables, the allocator and
prefix hashes are one host-side structure, the same for every rank and layout.

A plane holds one kind of entry, a tensor of slots in each of its layers. All planes have the same
pages and slots, so a page is moved and stored with all its planes, as `page_bytes` bytes: plane by
plane, each [layers of the plane, slots of a page, entry].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv3.config import ModelConfig
from dsv3.config_indexer import FULL
from dsv3.settings import CacheDtype, CacheForm, KvShard
from dsv3_kernels import Paging, packed_bytes, scale_bytes

# Page 0 is never allocated: its slots pad index rows and are never written.
NULL_PAGE = 0
_PAGE_UNIT = 64


@dataclass(frozen=True, slots=True)
class Plane:
    """Format of one kind of entry on one rank.

    Attributes:
        name: "latent" (normalized latent + rotated key), "heads" (expanded keys and values) or
            "index" (keys of the indexer).
        width: values of an entry.
        value_dim: values that FP8 quantizes, the others stay in bf16: for "latent" those before the
            rotated key (C); else `width`.
        layers: layers with such an entry, in order.
        dtype: storage format: "fp32", "bf16" or "fp8" (with scales).
        has_scales_apart: in FP8, the scales are a separate field: all values of a page come
            before all its scales. Else every entry is packed with its scales.
    """

    name: str
    width: int
    value_dim: int
    layers: tuple[int, ...]
    dtype: CacheDtype
    has_scales_apart: bool = False

    @property
    def field_bytes(self) -> tuple[int, ...]:
        """Bytes of the fields of an entry; a page has each field of all its entries in one run."""
        if self.dtype != "fp8":
            return (self.width * (4 if self.dtype == "fp32" else 2),)
        packed = packed_bytes(self.value_dim, self.width - self.value_dim)
        scales = scale_bytes(self.value_dim)
        return (packed - scales, scales) if self.has_scales_apart else (packed,)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return sum(self.field_bytes)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One rank's view of the cache.

    Attributes:
        planes: the entries of a position; the first is the keys and values of attention.
        paging: positions of a page, a multiple of 64 and of the shards, and those on this rank.
    """

    planes: tuple[Plane, ...]
    paging: Paging

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        form: CacheForm,
        kv_shard: KvShard,
        dtype: CacheDtype,
        tp: int,
        tp_rank: int,
        index_dtype: CacheDtype | None = None,
        has_mtp: bool = False,
    ) -> "CacheLayout":
        """Return the layout of a model's cache on rank `tp_rank` of `tp`.

        Args:
            config: the model.
            form: "latent" or "heads".
            kv_shard: "tokens" or "none"; a "heads" cache is sharded by heads in any case.
            dtype: "fp32", "bf16" or "fp8".
            tp: ranks of the tensor-parallel group.
            tp_rank: this rank's index in it.
            index_dtype: format of index keys; None for `dtype`, or "bf16" if that is "fp8".
            has_mtp: the MTP layer has a cache, too; it is the layer after the model's.
        """
        layers = tuple(range(config.num_hidden_layers + has_mtp))
        page_size = math.lcm(_PAGE_UNIT, tp)
        if form == "heads":
            width = (config.num_attention_heads // tp) * (config.qk_head_dim + config.v_head_dim)
            plane = Plane(form, width, width, layers, dtype)
            paging = Paging(page_size)
        else:
            latent = config.kv_lora_rank
            plane = Plane(form, latent + config.qk_rope_head_dim, latent, layers, dtype)
            is_sharded = kv_shard == "tokens"
            paging = Paging(page_size, tp, tp_rank) if is_sharded else Paging(page_size)
        if config.index_head_dim is None:
            return cls((plane,), paging)
        if index_dtype is None:
            index_dtype = "bf16" if dtype == "fp8" else dtype
        dim = config.index_head_dim
        indexed = tuple(i for i in layers if config.indexer_kind(i) == FULL)
        index = Plane("index", dim, dim, indexed, index_dtype, has_scales_apart=True)
        return cls((plane, index), paging)

    @property
    def main(self) -> Plane:
        """The plane of the keys and values of attention."""
        return self.planes[0]

    @property
    def form(self) -> CacheForm:
        """Content of the main plane."""
        return "heads" if self.main.name == "heads" else "latent"

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self.paging.page_size

    @property
    def position_bytes(self) -> int:
        """Bytes of a position in all layers and planes, on a rank that stores it."""
        return sum(len(plane.layers) * plane.entry_bytes for plane in self.planes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page on this rank, all layers and planes."""
        return self.paging.slots_per_page * self.position_bytes

    def fields(self, page: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Yield views of the fields of a page [page_bytes]: [layers, slots of a page, bytes]."""
        slots = self.paging.slots_per_page
        sizes = [len(plane.layers) * slots * plane.entry_bytes for plane in self.planes]
        planes = np.split(page, np.cumsum(sizes)[:-1])
        for plane, data in zip(self.planes, planes, strict=True):
            by_layer = data.reshape(len(plane.layers), -1)
            ends = np.cumsum([slots * size for size in plane.field_bytes])[:-1]
            for field in np.split(by_layer, ends, axis=1):
                yield field.reshape(len(plane.layers), slots, -1)

    def pages_for(self, num_tokens: int) -> int:
        """Return the pages that `num_tokens` positions of one sequence need."""
        return -(-num_tokens // self.page_size)
