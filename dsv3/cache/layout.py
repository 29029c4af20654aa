"""Geometry of the paged KV cache: the size of a page, and the rank that stores a position.

A page is `page_size` consecutive positions of one sequence, at every world size. With tokens
sharded, rank r of tp stores the positions p of the page with p mod tp = r; with heads sharded
or nothing sharded, every rank has a slot for each position. So page tables, the allocator and
prefix hashes are one host-side structure, the same for every rank and layout.
"""

import math
from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.settings import CacheDtype, CacheForm, KvShard
from dsv3_kernels import Paging

# Page 0 is never allocated: its slots pad index rows and are never written.
NULL_PAGE = 0
_PAGE_UNIT = 64
# Latent values that share a scale in the FP8 format.
FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One rank's view of the cache.

    Attributes:
        form: "latent" (normalized latent + rotated key) or "heads" (expanded keys and values).
        width: values of one entry on this rank.
        value_dim: for "latent", the values before the rotated key (C); else `width`.
        dtype: storage format: "fp32", "bf16" or, for latents, "fp8" (packed with scales).
        page_size: positions of a page, a multiple of 64 and of the token shards.
        shards: ranks over which a sequence's positions are sharded; 1 if they are not.
        shard: this rank's index among them.
    """

    form: CacheForm
    width: int
    value_dim: int
    dtype: CacheDtype
    page_size: int
    shards: int
    shard: int

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        form: CacheForm,
        kv_shard: KvShard,
        dtype: CacheDtype,
        tp: int,
        tp_rank: int,
    ) -> "CacheLayout":
        """Return the layout of a model's cache on rank `tp_rank` of `tp`.

        Args:
            config: the model.
            form: "latent" or "heads".
            kv_shard: "tokens" or "none"; a "heads" cache is sharded by heads in any case.
            dtype: "fp32", "bf16" or "fp8".
            tp: ranks of the tensor-parallel group.
            tp_rank: this rank's index in it.
        """
        page_size = math.lcm(_PAGE_UNIT, tp)
        if form == "heads":
            width = (config.num_attention_heads // tp) * (config.qk_head_dim + config.v_head_dim)
            return cls(form, width, width, dtype, page_size, 1, 0)
        latent = config.kv_lora_rank
        shards, shard = (tp, tp_rank) if kv_shard == "tokens" else (1, 0)
        width = latent + config.qk_rope_head_dim
        return cls(form, width, latent, dtype, page_size, shards, shard)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry on this rank."""
        if self.dtype == "fp8":
            scales = -(-self.value_dim // FP8_BLOCK)
            return self.value_dim + 4 * scales + 2 * (self.width - self.value_dim)
        return self.width * (4 if self.dtype == "fp32" else 2)

    @property
    def slots_per_page(self) -> int:
        """Slots of a page on this rank."""
        return self.page_size // self.shards

    @property
    def paging(self) -> Paging:
        """The mapping from positions to this rank's slots, as kernels take it."""
        return Paging(self.page_size, self.shards, self.shard)

    def pages_for(self, num_tokens: int) -> int:
        """Return the pages that `num_tokens` positions of one sequence need."""
        return -(-num_tokens // self.page_size)
