"""The decoder: embedding, layers, final norm, head, on a flat batch of tokens."""

from collections.abc import Iterator

from torch import Tensor, nn

from dsv3.cache.pool import CachePool, LayerCache
from dsv3.config import ModelConfig
from dsv3.model.attention import MLA
from dsv3.model.batch import Batch
from dsv3.model.indexer import Indexer
from dsv3.model.moe import MoE, feed_forward
from dsv3.model.rotary import Rotary
from dsv3.model.side_stream import SideStream
from dsv3.parallel.experts import DispatchSettings, ExpertDispatch
from dsv3.parallel.linear import VocabParallelEmbedding, VocabParallelHead
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.placement import Placement
from dsv3.parallel.rows import StreamRows
from dsv3.parallel.slots import ExpertSlots
from dsv3.parallel.weights import Matrix, Target, Vector, WeightFormat
from dsv3_kernels import Rotation


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    What a layer adds last is left to the next one, which sums over tp, adds, normalizes and
    quantizes at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        mesh: Mesh,
        fmt: WeightFormat,
        dispatch: ExpertDispatch,
        side: SideStream,
    ) -> None:
        super().__init__()
        prefix, shape = f"model.layers.{layer}.", (config.hidden_size,)
        self.eps = config.rms_norm_eps
        self.input_layernorm = Vector(f"{prefix}input_layernorm.weight", shape, fmt)
        self.self_attn = MLA(config, f"{prefix}self_attn.", mesh.layout, mesh.tp, fmt)
        self.indexer: Indexer | None = None
        if config.has_indexer:
            self.indexer = Indexer(config, f"{prefix}self_attn.indexer.", fmt)
        self.post_attention_layernorm = Vector(
            f"{prefix}post_attention_layernorm.weight", shape, fmt
        )
        self.mlp = feed_forward(config, layer, f"{prefix}mlp.", mesh.layout, fmt, dispatch, side)

    def forward(
        self,
        x_TD: Tensor,
        y_TD: Tensor | None,
        rotation: Rotation,
        batch: Batch,
        cache: LayerCache,
        rows: StreamRows,
    ) -> tuple[Tensor, Tensor]:
        """Take and return the residual stream and what is still to be added to it, [T, D].

        The stream is all rows, or this rank's; what is to be added is all rows of this rank's part.
        """
        norm_D, to = self.input_layernorm.weight, self.self_attn.in_proj
        x_TD, h_TD, h_q = rows.sum_norm(x_TD, y_TD, norm_D, self.eps, to.quantizes, to.ue8m0)
        y_TD = self.self_attn(h_TD, rotation, batch, cache, h_q)
        norm_D, up = self.post_attention_layernorm.weight, self.mlp.gate_up_proj
        x_TD, h_TD, h_q = rows.sum_norm(x_TD, y_TD, norm_D, self.eps, up.quantizes, up.ue8m0)
        return x_TD, self.mlp(h_TD, h_q)


class Transformer(nn.Module):
    """The main model of one rank. MTP layers stay in the checkpoint.

    Args:
        config: its shape.
        mesh: this rank and its peers.
        fmt: how weights are held.
        settings: how tokens come to their experts.
        split_from: steps of so many tokens split the residual stream over tp; 0 never does.
        placement: which rank holds which experts; None for equal ranges.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        fmt: WeightFormat,
        settings: DispatchSettings | None = None,
        split_from: int = 0,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        num_slots = config.n_routed_experts if placement is None else placement.num_slots
        self.dispatch = ExpertDispatch(mesh, num_slots, settings)
        if placement is not None:
            for i in placement.layers:
                self.dispatch.slots[f"model.layers.{i}.mlp."] = ExpertSlots(placement, i, mesh)
        self.config, self.tp, self.split_from = config, mesh.tp, split_from
        self.numerics = "fp8" if fmt.fp8_products else str(fmt.dtype).removeprefix("torch.")
        embed, head = "model.embed_tokens.weight", "lm_head.weight"
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(embed, vocab, hidden, mesh.layout, mesh.tp, fmt)
        side = SideStream(fmt.device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, mesh, fmt, self.dispatch, side)
            for i in range(config.num_hidden_layers)
        )
        self.norm = Vector("model.norm.weight", (hidden,), fmt)
        self.lm_head = VocabParallelHead(
            embed if config.tie_word_embeddings else head, vocab, hidden, mesh.layout, fmt
        )
        self.rotary = Rotary(config, fmt.device)

    def forward(self, batch: Batch, cache: CachePool) -> Tensor:
        """Run the new tokens through all layers; return the normalized hidden states, [T, D].

        A group without tokens takes part in what the whole world does: its experts serve others.
        """
        if not len(batch.token_T):
            return self._serve_others()
        count = len(batch.token_T)
        rows = StreamRows(self.tp, count, 0 < self.split_from <= count and self.tp.size > 1)
        x_TD, y_TD = rows.own(self.embed_tokens(batch.token_T)), None
        rotation = self.rotary(batch.position_T)
        for i, layer in enumerate(self.layers):
            x_TD, y_TD = layer(x_TD, y_TD, rotation, batch, cache.layer(i), rows)
        eps = self.config.rms_norm_eps
        return rows.sum_norm(x_TD, y_TD, self.norm.weight, eps, quant=False, ue8m0=False)[1]

    def _serve_others(self) -> Tensor:
        x_TD = self.embed_tokens.table.weight.new_empty(0, self.config.hidden_size)
        for layer in self.modules():
            if isinstance(layer, MoE):
                layer(x_TD)
        return x_TD

    def logits(self, x_MD: Tensor) -> Tensor:
        """Return this rank's columns of the logits, [M, ceil(W / tp)] float32."""
        return self.lm_head(x_MD)

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's weights, FP8 scales included."""
        held = (*self.parameters(), *self.buffers())
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def cut_names(self) -> set[str]:
        """Weights stored in FP8 but held in the compute dtype: an edge cuts their blocks."""
        cut = (m.names for m in self.modules() if isinstance(m, Matrix) and m.is_cut)
        return {name for stacked in cut for parts in stacked for name in parts}

    def targets(self) -> Iterator[Target]:
        """Yield every piece of memory to be filled from the checkpoint."""
        for module in self.modules():
            if isinstance(module, Matrix | Vector):
                yield from module.targets()
