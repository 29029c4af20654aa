"""Multi-head latent attention, in both forms, over this rank's shard of the cache.

    c = norm(W_kva x), the latent; k_rope = rope(W_kva x), one for all heads
    expanded: k_h = [W_UK,h c ; k_rope], v_h = W_UV,h c               (FLOPs per query: few)
    absorbed: q_h' = [W_UK,h^T q_h ; q_rope,h] attends to [c ; k_rope] itself, o_h = W_UV,h z_h

Heads are split over tp. A latent cache may be split by positions: then every rank needs all
heads' absorbed queries (all-gather) and returns, per head, its part of the average with its
log-sum-exp to the head's owner (all-to-all), which merges them exactly.

Source: DeepSeek-V2 paper (arXiv 2405.04434), section 2.1 and appendix C.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dsv3.cache.pool import LayerCache
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.model.batch import Batch, Chunk
from dsv3.parallel.collectives import Collectives
from dsv3.parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear
from dsv3.parallel.weights import Vector, WeightFormat
from dsv3_kernels import (
    Quantized,
    add_rmsnorm,
    apply_rope,
    merge_lse,
    mha_decode,
    mla_decode,
    mla_prefill,
    rmsnorm,
)

# transformers and DeepSeek's own code leave the two inner norms at this value, whatever the
# config's rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6
# Cached positions gathered and expanded at a time; a multiple of every usual page size.
_BLOCK = 2048


def absorb_limit(config: ModelConfig) -> int:
    """Return the query tokens of a sequence up to which absorbing costs fewer FLOPs.

    Per head and key, expanding costs C (N + V) once, absorbing 2 C - N - V more per query.
    """
    extra = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
    if extra <= 0:
        return 1
    heads_dim = config.qk_nope_head_dim + config.v_head_dim
    return max(1, config.kv_lora_rank * heads_dim // extra)


class MLA(nn.Module):
    """One layer's attention. Returns this rank's part of the output; the caller sums over tp."""

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        layout: ParallelConfig,
        tp: Collectives,
        fmt: WeightFormat,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.heads = config.num_attention_heads // layout.tp
        hidden, query = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            first = {"q_proj": self.heads * config.qk_head_dim}
        else:
            first = {"q_a_proj": config.q_lora_rank}
            self.q_a_layernorm = Vector(f"{prefix}q_a_layernorm.weight", (config.q_lora_rank,), fmt)
            self.q_b_proj = ColumnParallelLinear(
                prefix, {"q_b_proj": query}, config.q_lora_rank, layout, fmt
            )
        self.first_rows = sum(first.values())
        self.in_proj = Linear(prefix, {**first, "kv_a_proj_with_mqa": latent}, hidden, fmt)
        self.kv_a_layernorm = Vector(f"{prefix}kv_a_layernorm.weight", (config.kv_lora_rank,), fmt)
        expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        # Absorption multiplies by slices of this matrix at every step: never held in FP8.
        self.kv_b_proj = ColumnParallelLinear(
            prefix,
            {"kv_b_proj": expanded},
            config.kv_lora_rank,
            layout,
            replace(fmt, fp8_names=frozenset()),
        )
        values = config.num_attention_heads * config.v_head_dim
        self.o_proj = RowParallelLinear(prefix, "o_proj", hidden, values, layout, fmt)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        cache: LayerCache,
        x_q: Quantized | None = None,
    ) -> Tensor:
        """Return this rank's part of the attention output, [T, D]; `x_q` is x in FP8."""
        q_THX, entry_TX = self._project(x_TD, rope, x_q)
        if cache.layout.form == "heads":
            o_THV = self._naive(q_THX, entry_TX, batch, cache)
        else:
            o_THV = self._latent(q_THX, entry_TX, batch, cache)
        return self.o_proj(o_THV.flatten(1))

    def _project(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], x_q: Quantized | None
    ) -> tuple[Tensor, Tensor]:
        """Return queries [T, H, N + R] and cache entries [T, C + R], both rotated."""
        c = self.config
        first, latent_TC, k_TR = self.in_proj(x_TD, x_q).split(
            [self.first_rows, c.kv_lora_rank, c.qk_rope_head_dim], -1
        )
        if c.q_lora_rank is not None:
            up, norm = self.q_b_proj, self.q_a_layernorm.weight
            _, query_TA, query_q = add_rmsnorm(
                first, None, norm, _LATENT_NORM_EPS, up.quantizes, up.ue8m0
            )
            first = up(query_TA, query_q)
        q_THX = first.view(-1, self.heads, c.qk_head_dim)
        q_THN, q_THR = q_THX.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        cos, sin = rope
        q_THR = apply_rope(q_THR, cos[:, None], sin[:, None], c.rope_interleave)
        k_TR = apply_rope(k_TR, cos, sin, c.rope_interleave)
        latent_TC = rmsnorm(latent_TC, self.kv_a_layernorm.weight, _LATENT_NORM_EPS)
        return torch.cat((q_THN, q_THR), -1), torch.cat((latent_TC, k_TR), -1)

    def _expand(self, entry_SX: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [S, H, N + R] and values [S, H, V] of the local heads."""
        c = self.config
        latent_SC, k_SR = entry_SX.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(latent_SC).view(-1, self.heads, c.qk_nope_head_dim + c.v_head_dim)
        k_SHN, v_SHV = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_SHR = k_SR[:, None].expand(-1, self.heads, -1)
        return torch.cat((k_SHN, k_SHR), -1), v_SHV

    def _absorption(self) -> tuple[Tensor, Tensor]:
        """Return W_UK [H, N, C] and W_UV [H, V, C] of the local heads."""
        c = self.config
        w_HYC = self.kv_b_proj.matrix().view(self.heads, -1, c.kv_lora_rank)
        return w_HYC[:, : c.qk_nope_head_dim], w_HYC[:, c.qk_nope_head_dim :]

    # Latent cache ---------------------------------------------------------------------------

    def _latent(self, q_THX: Tensor, entry_TX: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        own = entry_TX if batch.own_row is None else entry_TX[batch.own_row]
        cache.write(batch.own_slot, own)
        if not batch.chunks:
            return self._absorbed(q_THX, batch, cache)
        o_THV = q_THX.new_empty((*q_THX.shape[:2], self.config.v_head_dim), dtype=torch.float32)
        decode = batch.num_decode_rows
        if decode:
            o_THV[:decode] = self._absorbed(q_THX[:decode], batch, cache)
        entry_TX = cache.round(entry_TX)
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.stop)
            o_THV[rows] = self._expanded(q_THX[rows], entry_TX[rows], chunk, cache)
        return o_THV

    def _absorbed(self, q_THX: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Attend from the decode rows to the cached latents; [T, H, V] of the local heads."""
        w_uk, w_uv = self._absorption()
        q_THN, q_THR = q_THX.split([w_uk.shape[1], self.config.qk_rope_head_dim], -1)
        q_THC = torch.bmm(q_THN.transpose(0, 1), w_uk).transpose(0, 1)
        q_THX = torch.cat((q_THC, q_THR), -1)
        sharded = cache.layout.shards > 1
        if sharded:
            q_THX = self.tp.all_gather(q_THX).transpose(0, 1).flatten(1, 2)
        z_THC, lse_TH = self._attend_groups(q_THX, batch, cache)
        if sharded:
            z_THC = self._return_to_owners(z_THC, lse_TH)
        z_HTC = z_THC.to(w_uv.dtype).transpose(0, 1)
        return torch.bmm(z_HTC, w_uv.transpose(1, 2)).transpose(0, 1)

    def _attend_groups(
        self, q_THX: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for g in batch.groups:
            B, Q = g.query_pos_BQ.shape
            out, lse = mla_decode(
                q_THX[g.start : g.stop].view(B, Q, *q_THX.shape[1:]),
                cache.slots,
                g.slot_BS,
                g.key_pos_BS,
                g.query_pos_BQ,
                self.config.kv_lora_rank,
                self.config.softmax_scale,
            )
            outs.append(out.flatten(0, 1))
            lses.append(lse.flatten(0, 1))
        if len(outs) == 1:
            return outs[0], lses[0]
        return torch.cat(outs), torch.cat(lses)

    def _return_to_owners(self, z_THC: Tensor, lse_TH: Tensor) -> Tensor:
        """Send every head's partial result to the rank that owns it; merge what arrives."""
        packed = torch.cat((z_THC, lse_TH.unsqueeze(-1)), -1)
        by_owner = packed.unflatten(1, (self.tp.size, self.heads)).transpose(0, 1)
        parts = self.tp.all_to_all(by_owner.contiguous())
        return merge_lse(parts[..., :-1], parts[..., -1])[0]

    def _expanded(self, q_QHX: Tensor, entry_QX: Tensor, chunk: Chunk, cache: LayerCache) -> Tensor:
        """Attend from a chunk to its context, block by block, and to itself; [Q, H, V]."""
        context, scale = chunk.context_len, self.config.softmax_scale
        parts = []
        pages_per_block = max(1, _BLOCK // cache.layout.page_size)
        for first_page in range(0, cache.layout.pages_for(context), pages_per_block):
            first = first_page * cache.layout.page_size
            page_G = chunk.page_G[first_page : first_page + pages_per_block]
            length = min(context - first, len(page_G) * cache.layout.page_size)
            block = cache.gather(page_G, length, entry_QX.dtype)
            parts.append(mla_prefill(q_QHX, *self._expand(block), first, context, scale))
        parts.append(mla_prefill(q_QHX, *self._expand(entry_QX), context, context, scale))
        if len(parts) == 1:
            return parts[0][0]
        return merge_lse(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))[0]

    # Cache of expanded heads ----------------------------------------------------------------

    def _naive(self, q_THX: Tensor, entry_TX: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        k_THX, v_THV = self._expand(entry_TX)
        kv_THY = torch.cat((k_THX, v_THV), -1)
        cache.write(batch.own_slot, kv_THY.flatten(1))
        scale, split = self.config.softmax_scale, [k_THX.shape[-1], v_THV.shape[-1]]
        o_THV = torch.empty_like(v_THV, dtype=torch.float32)
        for g in batch.groups:
            o_THV[g.start : g.stop] = mha_decode(
                q_THX[g.start : g.stop],
                cache.slots,
                g.slot_BS,
                g.key_pos_BS,
                g.query_pos_BQ[:, 0],
                scale,
            )
        kv_THY = cache.round(kv_THY)
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.stop)
            earlier = cache.gather(chunk.page_G, chunk.context_len, kv_THY.dtype)
            kv = torch.cat((earlier.unflatten(1, (self.heads, -1)), kv_THY[rows]))
            k, v = kv.split(split, -1)
            o_THV[rows] = mla_prefill(q_THX[rows], k, v, 0, chunk.context_len, scale)[0]
        return o_THV
