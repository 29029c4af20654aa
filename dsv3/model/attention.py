"""Multi-head latent attention, expanded and absorbed, over this rank's shard of the cache.

    c = norm(W_kva x), the latent; k_rope = rope(W_kva x), one for all heads
    expanded: k_h = [W_UK,h c ; k_rope], v_h = W_UV,h c               (FLOPs per query: few)
    absorbed: q_h' = [W_UK,h^T q_h ; q_rope,h] attends to [c ; k_rope] itself, o_h = W_UV,h z_h

Heads are split over tp. A latent cache may be sharded by positions: then every rank gets all
heads' absorbed queries (all-gather), attends to its own positions, and sends the partial output of
each head with its log-sum-exp to the head's rank (all-to-all), which merges them exactly.

In sparse attention the indexer replaces the page tables of a group by those of its selection; the
rest is absorbed attention.

Source: DeepSeek-V2 paper (arXiv 2405.04434), section 2.1 and appendix C.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.cache.pool import LayerCache
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_indexer import FULL
from dsv3.distributed.collectives import Collectives
from dsv3.model.batch import Batch
from dsv3.model.chunk_attention import attend_chunks
from dsv3.model.indexer import Indexer, all_keys
from dsv3.parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear
from dsv3.parallel.module import Module
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Vector
from dsv3_kernels import (
    EntryWrite,
    KeysValues,
    PageTables,
    Quantized,
    Rotation,
    absorb_query,
    empty_parts,
    expand_values,
    latent_entries,
    mha_decode,
    mla_decode_parts,
    mla_decode_values,
    mla_prefill,
    norm_and_cache,
    open_parts,
    rmsnorm,
    rope_and_cache,
    rotate,
)

# Rows of a sparse chunk that are absorbed at a time. V3's 128 heads take 75 MB in bfloat16.
_ROWS = 512


class _Queries(NamedTuple):
    """The queries of a step, and its entries.

    Attributes:
        latent_TA: [T, A] normalized query latents, input of the indexer; undefined without a
            low-rank path of queries, where no model has an indexer.
        q_THX: [T, H, N + R] queries of the local heads, not yet rotated.
        entry_TX: entries of the chunks' rows, see `rope_and_cache`.
    """

    latent_TA: Tensor
    q_THX: Tensor
    entry_TX: Tensor


class MLA(Module):
    """Attention of one layer. Returns this rank's part of the output; the caller sums over tp."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        layout: ParallelConfig,
        tp: Collectives,
        fmt: WeightFormat,
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}.self_attn."
        self.indexer: Indexer | None = None
        if config.indexer_kind(layer) == FULL:
            self.indexer = Indexer(config, f"{prefix}indexer.", tp, fmt)
        self.config = config
        self.tp = tp
        self.heads = config.num_attention_heads // layout.tp
        # Computed from other fields of the config.
        self.scale = config.softmax_scale
        self.eps = config.latent_norm_eps
        hidden = config.hidden_size
        query = config.num_attention_heads * config.qk_head_dim
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            first = {"q_proj": self.heads * config.qk_head_dim}
        else:
            first = {"q_a_proj": config.q_lora_rank}
            self.q_a_layernorm = Vector(f"{prefix}q_a_layernorm.weight", (config.q_lora_rank,), fmt)
            self.q_b_proj = ColumnParallelLinear(
                prefix,
                {"q_b_proj": query},
                config.q_lora_rank,
                layout,
                fmt,
                must_be_finite=True,  # a softmax hides infinite scores
            )
        self.first_rows = sum(first.values())
        in_parts = {**first, "kv_a_proj_with_mqa": latent}
        self.in_proj = Linear(prefix, in_parts, hidden, fmt, must_be_finite=True)
        self.kv_a_layernorm = Vector(f"{prefix}kv_a_layernorm.weight", (config.kv_lora_rank,), fmt)
        expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        # Absorption multiplies by slices of this matrix at every step: never kept in FP8.
        self.kv_b_proj = ColumnParallelLinear(
            prefix,
            {"kv_b_proj": expanded},
            config.kv_lora_rank,
            layout,
            fmt,
            quantized=False,
            must_be_finite=True,
            by_rows=True,
        )
        w_HYC = self.kv_b_proj.matrix().view(self.heads, -1, config.kv_lora_rank)
        # W_UK [H, N, C] and W_UV [H, V, C] of the local heads: views, made once.
        w_uk, w_uv = w_HYC.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        self._absorption = w_uk, w_uv
        self._for_cpu = fmt.cpu_products
        values = config.num_attention_heads * config.v_head_dim
        self.o_proj = RowParallelLinear(prefix, "o_proj", hidden, values, layout, fmt)

    def pack(self) -> None:
        """Arrange the loaded W_UK and W_UV for a CPU, whose bfloat16 products would copy them."""
        w_uk, w_uv = self._absorption
        if self._for_cpu and w_uk.dtype == torch.bfloat16:
            self._absorption = w_uk.contiguous(), w_uv.mT.contiguous().mT

    def forward(
        self,
        x_TD: Tensor,
        rotation: Rotation,
        batch: Batch,
        cache: LayerCache,
        x_q: Quantized | None = None,
    ) -> Tensor:
        """Return this rank's part of the attention output, [T, D]; `x_q` is x in FP8."""
        c = self.config
        decode = batch.num_decode_rows
        split = self.first_rows, c.kv_lora_rank + c.qk_rope_head_dim
        first, kv_TX = self.in_proj(x_TD, x_q).split_with_sizes(split, -1)
        if self.indexer is not None:
            assert cache.index is not None
            self.indexer.write(x_TD, rotation, batch, cache.index, x_q)
        if cache.layout.form == "heads":
            o_THV = self._naive(x_TD, first, kv_TX, rotation, batch, cache)
            return self.o_proj(o_THV.flatten(1))
        write = EntryWrite(
            kv_TX=kv_TX,
            weight_C=self.kv_a_layernorm.weight,
            eps=self.eps,
            rotation=rotation,
            cache_SX=cache.slots,
            slot_T=batch.own_slot,
            keep_from=decode,
            stored=batch.stored,
        )
        c_TA, q_THX, chunk_TX = self._queries(first, write)
        tables = self._keys(x_TD, c_TA, rotation, batch, cache)
        if not batch.chunks:
            quant = self.o_proj.quantizes
            o_TF, o_q = self._absorbed(q_THX, rotation, tables, cache, quant)
            return self.o_proj(o_TF, o_q)
        q_decode, q_chunk = q_THX.tensor_split([decode])
        self._rotate(q_chunk, rotation.tokens(decode))
        o_TF = attend_chunks(q_chunk, chunk_TX, self._expand, batch, cache, self.scale).flatten(1)
        if decode:
            first_TF, _ = self._absorbed(q_decode, rotation.tokens(0, decode), tables, cache)
            o_TF = torch.cat((first_TF.to(o_TF.dtype), o_TF))
        return self.o_proj(o_TF)

    def _keys(
        self, x_TD: Tensor, c_TA: Tensor, rotation: Rotation, batch: Batch, cache: LayerCache
    ) -> list[PageTables]:
        """Return the keys that each decode group attends to: selected here, or by a layer before.

        A collective if the layer selects keys and positions are sharded.
        """
        if self.indexer is not None and not batch.keeps_selected:
            batch.selected = self.indexer.select(x_TD, c_TA, rotation, batch, cache)
        elif not batch.selected:
            batch.selected = [all_keys(g, cache.layout) for g in batch.groups]
        return batch.selected

    def _queries(self, first: Tensor, write: EntryWrite) -> _Queries:
        """Project the queries, and write the entries of the step to the cache."""
        if self.config.q_lora_rank is None:
            latent = first
            query = first
            entry_TX = rope_and_cache(write)
        else:
            up = self.q_b_proj
            latent, latent_q, entry_TX = norm_and_cache(
                first,
                weight_A=self.q_a_layernorm.weight,
                quant=up.quantizes,
                ue8m0=up.ue8m0,
                write=write,
            )
            query = up(latent, latent_q)
        q_THX = query.view(-1, self.heads, self.config.qk_head_dim)
        return _Queries(latent, q_THX, entry_TX)

    def _rotate(self, q_THX: Tensor, rotation: Rotation) -> None:
        """Rotate queries in place."""
        rotate(q_THX[..., self.config.qk_nope_head_dim :], rotation)

    def _expand(self, entry_SX: Tensor) -> KeysValues:
        """Return keys and values of the local heads."""
        c = self.config
        latent_SC, k_SR = entry_SX.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(latent_SC).view(-1, self.heads, c.qk_nope_head_dim + c.v_head_dim)
        k_SHN, v_SHV = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        return KeysValues(k_SHN, k_SR[:, None].expand(-1, self.heads, -1), v_SHV)

    # Latent cache ---------------------------------------------------------------------------

    def _absorbed(
        self,
        q_THX: Tensor,
        rotation: Rotation,
        tables: list[PageTables],
        cache: LayerCache,
        quant: bool = False,
    ) -> tuple[Tensor, Quantized | None]:
        """Attend from the decode rows to the cached latents.

        Returns:
            [T, H * V] of the local heads, and that in FP8 if asked for.
        """
        if len(q_THX) <= _ROWS:  # the usual decode step
            return self._absorbed_block(q_THX, rotation, tables, cache, quant)
        outs = []
        start = 0
        for block in _row_blocks(tables):
            stop = start + sum(part.query_pos_BQ.numel() for part in block)
            turn = rotation.tokens(start, stop)
            outs.append(self._absorbed_block(q_THX[start:stop], turn, block, cache, False)[0])
            start = stop
        return torch.cat(outs), None

    def _absorbed_block(
        self,
        q_THX: Tensor,
        rotation: Rotation,
        tables: list[PageTables],
        cache: LayerCache,
        quant: bool,
    ) -> tuple[Tensor, Quantized | None]:
        """Do `_absorbed` for all rows at once; `tables` are those of the rows, in order."""
        w_uk, w_uv = self._absorption
        q_THX = absorb_query(q_THX, w_uk, rotation)
        if cache.layout.paging.shards == 1:
            z_THC = self._attend_groups(q_THX, tables, cache)
            return expand_values(z_THC[None], None, w_uv, quant, self.o_proj.ue8m0)
        # From here on all ranks' heads, until every head's results are with its owner again.
        q_PTHX = self.tp.all_gather(q_THX)
        parts = empty_parts(q_PTHX, self.config.kv_lora_rank)
        start = 0
        for keys in tables:
            stop = start + keys.query_pos_BQ.numel()
            mla_decode_parts(
                q_PTHX[:, start:stop],
                cache_SX=cache.slots,
                tables=keys,
                scale=self.scale,
                parts_PTHY=parts[:, start:stop],
            )
            start = stop
        z_PTHC, lse_PTH = open_parts(self.tp.all_to_all(parts))
        return expand_values(z_PTHC, lse_PTH, w_uv, quant, self.o_proj.ue8m0)

    def _attend_groups(self, q_THX: Tensor, tables: list[PageTables], cache: LayerCache) -> Tensor:
        """Attend to a cache that is not sharded; [T, H, C]."""
        outs = []
        start = 0
        for keys in tables:
            stop = start + keys.query_pos_BQ.numel()
            o_BQHC = mla_decode_values(
                q_THX[start:stop].unflatten(0, keys.query_pos_BQ.shape),
                cache_SX=cache.slots,
                tables=keys,
                value_dim=self.config.kv_lora_rank,
                scale=self.scale,
            )
            outs.append(o_BQHC.flatten(0, 1))
            start = stop
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    # Cache of expanded heads ----------------------------------------------------------------

    def _naive(
        self,
        x_TD: Tensor,
        first: Tensor,
        kv_TX: Tensor,
        rotation: Rotation,
        batch: Batch,
        cache: LayerCache,
    ) -> Tensor:
        """Attend to expanded keys and values, cached for the local heads; [T, H, V]."""
        c = self.config
        eps = self.eps
        latent = first
        if c.q_lora_rank is not None:
            latent = rmsnorm(first, self.q_a_layernorm.weight, eps)
            first = self.q_b_proj(latent)
        q_THX = first.view(-1, self.heads, c.qk_head_dim)
        self._rotate(q_THX, rotation)
        entry_TX = latent_entries(kv_TX, self.kv_a_layernorm.weight, eps, rotation)
        new = self._expand(entry_TX)
        split = [x.shape[-1] for x in (new.k_SHN, new.k_SHR, new.v_SHV)]
        kv_THY = torch.cat((new.k_SHN, new.k_SHR, new.v_SHV), -1)
        cache.write(batch.own_slot, kv_THY.flatten(1))
        scale = self.scale
        o_THV = torch.empty_like(new.v_SHV, dtype=torch.float32)
        tables = self._keys(x_TD, latent, rotation, batch, cache)
        for g, keys in zip(batch.groups, tables, strict=True):
            rows = slice(g.start, g.stop)
            o_THV[rows] = mha_decode(
                q_THX[rows], cache_SY=cache.slots, tables=keys.by_query(), scale=scale
            )
        kv_THY = cache.round(kv_THY)
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.stop)
            earlier = cache.gather(chunk.page_G, chunk.context_len, kv_THY.dtype)
            kv = torch.cat((earlier.unflatten(1, (self.heads, -1)), kv_THY[rows]))
            attended = mla_prefill(
                q_THX[rows],
                keys=KeysValues(*kv.split(split, -1)),
                first_key=0,
                first_query=chunk.context_len,
                scale=scale,
            )
            o_THV[rows] = attended.o
        return o_THV


def _row_blocks(tables: list[PageTables]) -> Iterator[list[PageTables]]:
    """Yield the tables of about `_ROWS` rows at a time.

    Only tables of one query per sequence, as selections are, are cut: the absorbed queries of a
    long prompt would take too much memory. Other sequences are kept whole, because their queries
    share the reads of their keys.
    """
    block: list[PageTables] = []
    num_rows = 0
    for keys in tables:
        has_one_query = keys.query_pos_BQ.shape[1] == 1
        for _, part in keys.blocks(_ROWS) if has_one_query else [(slice(None), keys)]:
            count = part.query_pos_BQ.numel()
            if block and num_rows + count > _ROWS:
                yield block
                block = []
                num_rows = 0
            block.append(part)
            num_rows += count
    yield block
