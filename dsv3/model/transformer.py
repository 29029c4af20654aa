"""The decoder: embedding, layers, final norm, head, on a flat batch of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dsv3.cache.pool import CachePool, LayerCache
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.model.attention import MLA
from dsv3.model.batch import Batch
from dsv3.model.moe import MoE, Router, feed_forward
from dsv3.model.rotary import Rotary
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch, StepTokens
from dsv3.parallel.expert_placement import Placement
from dsv3.parallel.linear import Linear, VocabParallelEmbedding, VocabParallelHead
from dsv3.parallel.physical_experts import PhysicalExperts
from dsv3.parallel.sequence_parallel import SequenceParallel
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weights import Matrix, Target, Vector, WeightFormat
from dsv3_kernels import Rotation


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    The last addition of a layer is done by the next layer, which sums over tp, adds, normalizes and
    quantizes in one operation.
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
        prefix = f"model.layers.{layer}."
        shape = (config.hidden_size,)
        self.eps = config.rms_norm_eps
        self.input_layernorm = Vector(f"{prefix}input_layernorm.weight", shape, fmt)
        self.self_attn = MLA(config, layer, mesh.layout, mesh.tp, fmt)
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
        rows: SequenceParallel,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x_TD: residual stream: all rows, or this rank's (see `SequenceParallel`).
            y_TD: this rank's part of the previous layer's last summand, all rows; None for zero.
            rotation: rotary embedding of the positions.
            batch: the step.
            cache: of this layer.
            rows: distribution of the rows over tp.

        Returns:
            The new x_TD and y_TD.
        """
        in_proj = self.self_attn.in_proj
        x_TD, h_TD, h_q = rows.sum_norm(
            x_TD,
            y_TD,
            self.input_layernorm.weight,
            self.eps,
            quant=in_proj.quantizes,
            ue8m0=in_proj.ue8m0,
        )
        y_TD = self.self_attn(h_TD, rotation, batch, cache, h_q)
        gate_up_proj = self.mlp.gate_up_proj
        x_TD, h_TD, h_q = rows.sum_norm(
            x_TD,
            y_TD,
            self.post_attention_layernorm.weight,
            self.eps,
            quant=gate_up_proj.quantizes,
            ue8m0=gate_up_proj.ue8m0,
        )
        if isinstance(self.mlp, MoE):
            return x_TD, self.mlp(h_TD, h_q, batch.tokens)
        return x_TD, self.mlp(h_TD, h_q)


class Transformer(nn.Module):
    """The main model on one rank. MTP layers are not loaded.

    Args:
        config: the model.
        mesh: this rank and its groups.
        fmt: storage format of weights.
        settings: of expert dispatch.
        sp_min_tokens: steps of at least this number of tokens split the residual stream over tp;
            0 never does.
        placement: of experts; None for equal ranges.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        fmt: WeightFormat,
        settings: DispatchSettings | None = None,
        sp_min_tokens: int = 0,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        num_physical = config.n_routed_experts if placement is None else placement.num_physical
        self.dispatch = ExpertDispatch(mesh, num_physical, settings)
        if placement is not None:
            for i in placement.layers:
                physical_experts = PhysicalExperts(placement, i, mesh)
                self.dispatch.physical_experts[f"model.layers.{i}.mlp."] = physical_experts
        self.config = config
        self.tp = mesh.tp
        self.sp_min_tokens = sp_min_tokens
        self.numerics = "fp8" if fmt.fp8_products else str(fmt.dtype).removeprefix("torch.")
        embed = "model.embed_tokens.weight"
        head = "lm_head.weight"
        vocab = config.vocab_size
        hidden = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(embed, vocab, hidden, mesh.layout, mesh.tp, fmt)
        self.side = SideStream(fmt.device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, mesh, fmt, self.dispatch, self.side)
            for i in range(config.num_hidden_layers)
        )
        self.norm = Vector("model.norm.weight", (hidden,), fmt)
        self.lm_head = VocabParallelHead(
            embed if config.tie_word_embeddings else head, vocab, hidden, mesh.layout, fmt
        )
        self.rotary = Rotary(config, fmt.device)

    def forward(self, batch: Batch, cache: CachePool) -> Tensor:
        """Run the new tokens through all layers; return the normalized hidden states, [T, D].

        A dp group without tokens takes part in the exchanges of the whole world: its experts serve
        the other groups.
        """
        if not len(batch.token_T):
            return self._serve_others(batch.tokens)
        count = len(batch.token_T)
        is_split = 0 < self.sp_min_tokens <= count and self.tp.size > 1
        rows = SequenceParallel(self.tp, count, is_split)
        x_TD = rows.own(self.embed_tokens(batch.token_T))
        y_TD = None
        rotation = self.rotary(batch.position_T)
        for i, layer in enumerate(self.layers):
            x_TD, y_TD = layer(x_TD, y_TD, rotation, batch, cache.layer(i), rows)
        eps = self.config.rms_norm_eps
        _, h_TD, _ = rows.sum_norm(x_TD, y_TD, self.norm.weight, eps, quant=False, ue8m0=False)
        return h_TD

    def _serve_others(self, tokens: StepTokens) -> Tensor:
        x_TD = self.embed_tokens.table.weight.new_empty(0, self.config.hidden_size)
        for layer in self.modules():
            if isinstance(layer, MoE):
                layer(x_TD, tokens=tokens)
        return x_TD

    @torch.inference_mode()
    def clear_locks(self) -> None:
        """Zero the counters of the split products, as a kernel leaves them that ran to its end."""
        self.side.finish()  # a kernel that still runs would count on
        for module in self.modules():
            if isinstance(module, Linear | Router | VocabParallelHead):
                module.locks.zero_()

    def logits(self, x_MD: Tensor) -> Tensor:
        """Return this rank's columns of the logits, [M, ceil(W / tp)] float32."""
        return self.lm_head(x_MD)

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's weights, FP8 scales included."""
        tensors = (*self.parameters(), *self.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def cut_names(self) -> set[str]:
        """Weights stored in FP8 but kept in the compute dtype: an edge cuts their blocks."""
        cut = (m.names for m in self.modules() if isinstance(m, Matrix) and m.is_cut)
        return {name for stacked in cut for parts in stacked for name in parts}

    def targets(self) -> Iterator[Target]:
        """Yield the targets of all weights, for the loader."""
        for module in self.modules():
            if isinstance(module, Matrix | Vector):
                yield from module.targets()
