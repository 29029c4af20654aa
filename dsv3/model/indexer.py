"""V3.2's lightning indexer: it selects the cached positions that each token attends to.

    k(s) = rope(LayerNorm(W_k x_s)), one small key per position, cached beside its latent
    I(t, s) = sum_h w_h(t) relu(q_h(t) . k(s)), q = rope(W_q c_q(t)), w = W_w x_t

A token attends to the index_topk positions up to its own with the highest scores; of equal scores,
to the lower position. Up to index_topk positions these are all, and attention is dense.

The weights are replicated, the keys are sharded by positions like the latents. Every rank scores
its own positions; the best of each rank travel, as scores with positions, and every rank keeps its
own of the best of all.

Source: DeepSeek-V3.2 report, section 2.1.
"""

from torch import Tensor

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import LayerCache
from dsv3.config import ModelConfig
from dsv3.distributed.collectives import Collectives
from dsv3.model.batch import Batch, DecodeGroup
from dsv3.parallel.linear import Linear
from dsv3.parallel.module import Module
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Vector
from dsv3_kernels import (
    IndexCache,
    IndexWrite,
    PageTables,
    Quantized,
    Rotation,
    index_queries,
    index_scores,
    router_logits,
    select_slots,
    top_candidates,
    write_index_keys,
)

# Scores in memory at a time. On a CPU their 8 MiB and the candidates made of them nearly fit a
# processor's cache; a GPU needs large launches.
_CPU_SCORES = 1 << 21
_GPU_SCORES = 1 << 26


class Indexer(Module):
    """The indexer of one layer, the same on all ranks.

    Args:
        config: the model.
        prefix: checkpoint name of the indexer, with its final dot.
        tp: ranks that share the cached positions.
        fmt: dtype and device of the weights.
    """

    def __init__(
        self, config: ModelConfig, prefix: str, tp: Collectives, fmt: WeightFormat
    ) -> None:
        super().__init__()
        assert config.index_n_heads and config.index_head_dim and config.index_topk
        assert config.q_lora_rank
        self.tp = tp
        self.heads = config.index_n_heads
        self.topk = config.index_topk
        self.interleaved = config.indexer_rope_interleave
        dim = config.index_head_dim
        hidden = config.hidden_size
        # Their infinities would not reach the output, where they would be noticed: they would only
        # select other positions.
        self.wq_b = Linear(
            prefix, {"wq_b": self.heads * dim}, config.q_lora_rank, fmt, must_be_finite=True
        )
        self.wk = Linear(prefix, {"wk": dim}, hidden, fmt, must_be_finite=True)
        self.k_norm = Vector(f"{prefix}k_norm.weight", (dim,), fmt)
        self.k_norm_bias = Vector(f"{prefix}k_norm.bias", (dim,), fmt)
        self.weights_proj = Vector(f"{prefix}weights_proj.weight", (self.heads, hidden), fmt)

    def write(
        self,
        x_TD: Tensor,
        rotation: Rotation,
        batch: Batch,
        cache: IndexCache,
        x_q: Quantized | None = None,
    ) -> None:
        """Store the keys of all new tokens, in steps without sparse groups too.

        Args:
            x_TD: normalized input of the layer.
            rotation: of the tokens.
            batch: the step.
            cache: of the layer.
            x_q: x in FP8, if known.
        """
        write_index_keys(
            IndexWrite(
                key_TI=self.wk(x_TD, x_q),
                weight_I=self.k_norm.weight,
                bias_I=self.k_norm_bias.weight,
                rotation=self._turn(rotation),
                cache=cache,
                slot_T=batch.own_slot,
            )
        )

    def select(
        self, x_TD: Tensor, c_TA: Tensor, rotation: Rotation, batch: Batch, cache: LayerCache
    ) -> list[PageTables]:
        """Return the keys of each decode group. A collective if positions are sharded.

        Args:
            x_TD: normalized input of the layer.
            c_TA: normalized query latents.
            rotation: of the tokens.
            batch: the step; its keys must have been written.
            cache: of the layer.
        """
        return [
            self._select(x_TD, c_TA, rotation, g, cache)
            if g.is_sparse
            else all_keys(g, cache.layout)
            for g in batch.groups
        ]

    def _select(
        self, x_TD: Tensor, c_TA: Tensor, rotation: Rotation, g: DecodeGroup, cache: LayerCache
    ) -> PageTables:
        """Return the selected keys of a sparse group: tables of one-slot pages, one per query."""
        assert cache.index is not None
        rows = slice(g.start, g.stop)
        q_THI = self.wq_b(c_TA[rows]).unflatten(-1, (self.heads, -1))
        weight_STH = router_logits(x_TD[rows], self.weights_proj.weight)
        turn = self._turn(rotation.tokens(g.start, g.stop))
        q_THI, weight_TH = index_queries(q_THI, weight_STH, turn, cache.index.is_fp8)
        tables = all_keys(g, cache.layout)
        is_sharded = tables.paging.shards > 1
        most_scores = _CPU_SCORES if q_THI.device.type == "cpu" else _GPU_SCORES
        selections = []
        for block, some in tables.blocks(max(1, most_scores // tables.capacity)):
            score_TS = index_scores(q_THI[block], weight_TH[block], cache.index, some)
            best_TK = top_candidates(score_TS, self.topk, some)
            best_PTK = self.tp.all_gather(best_TK) if is_sharded else best_TK[None]
            selections.append(select_slots(best_PTK, self.topk, some))
        return PageTables.stacked(selections)

    def _turn(self, rotation: Rotation) -> Rotation:
        """Return a rotation in the indexer's order of dimensions: V3.2's is half-split, MLA's not.

        DeepSeek's first demo took the interleaved order here too. Answers to short contexts do not
        show the mistake.
        """
        return Rotation(rotation.cos_Tr, rotation.sin_Tr, self.interleaved, rotation.complex_Tr)


def all_keys(g: DecodeGroup, layout: CacheLayout) -> PageTables:
    """Return all cached keys of a group."""
    return PageTables(g.page_BG, g.query_pos_BQ, layout.paging, g.keys)
