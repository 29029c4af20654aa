"""The decoder: embedding, layers, final norm, head, on a flat batch of tokens."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dsv3.cache.pool import CachePool
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.model.attention import MLA
from dsv3.model.batch import Batch
from dsv3.model.decoder_layer import DecoderLayer
from dsv3.model.moe import MoE, Router
from dsv3.model.mtp import MTP
from dsv3.model.rotary import Rotary
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch, StepTokens
from dsv3.parallel.expert_placement import Placement
from dsv3.parallel.linear import Linear, VocabParallelEmbedding, VocabParallelHead
from dsv3.parallel.module import Module
from dsv3.parallel.physical_experts import PhysicalExperts
from dsv3.parallel.sequence_parallel import SequenceParallel
from dsv3.parallel.storage import Storage
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix, Target, Vector


class Transformer(Module):
    """The model on one rank.

    Args:
        config: the model.
        mesh: this rank and its groups.
        fmt: storage format of weights.
        settings: of expert dispatch.
        sp_min_tokens: steps of at least this number of tokens split the residual stream over tp;
            0 never does.
        placement: of experts; None for equal ranges.
        has_mtp: also load the first MTP layer, which drafts tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        fmt: WeightFormat,
        settings: DispatchSettings | None = None,
        sp_min_tokens: int = 0,
        placement: Placement | None = None,
        has_mtp: bool = False,
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
        self.numerics = fmt.numerics
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
        self.mtp: MTP | None = None
        if has_mtp:
            self.mtp = MTP(config, mesh, fmt, self.dispatch, self.side)

    def forward(self, batch: Batch, cache: CachePool) -> Tensor:
        """Run the new tokens through all layers; return the normalized hidden states, [T, D].

        A dp group without tokens takes part in the exchanges of the whole world: its experts serve
        the other groups.
        """
        if not len(batch.token_T):
            return self._serve_others(self.layers, batch.tokens)
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

    def draft(self, h_TD: Tensor, next_T: Tensor, batch: Batch, cache: CachePool) -> Tensor:
        """Run tokens through the MTP layer; return its hidden states (see `MTP.forward`).

        Args:
            h_TD: hidden states of the tokens.
            next_T: [T] int64 the tokens after them.
            batch: the tokens.
            cache: the cache, with an MTP layer.
        """
        assert self.mtp is not None
        if not len(batch.token_T):
            return self._serve_others([self.mtp.layer], batch.tokens)
        e_TD = self.embed_tokens(next_T)
        rotation = self.rotary(batch.position_T)
        return self.mtp(h_TD, e_TD, rotation, batch, cache.layer(self.config.num_hidden_layers))

    def _serve_others(self, layers: Iterable[nn.Module], tokens: StepTokens) -> Tensor:
        x_TD = self.embed_tokens.table.weight.new_empty(0, self.config.hidden_size)
        for layer in layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp(x_TD, tokens=tokens)
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
        total = 0
        for module in self.modules():
            if isinstance(module, Storage):
                total += module.num_bytes
            else:
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                total += sum(t.numel() * t.element_size() for t in own)
        return total

    @property
    def cut_names(self) -> set[str]:
        """Weights stored quantized but kept in the compute dtype: an edge cuts a block or group."""
        cut = (m.names for m in self.modules() if isinstance(m, Matrix) and m.is_cut)
        return {name for stacked in cut for parts in stacked for name in parts}

    @torch.inference_mode()
    def pack_weights(self) -> None:
        """Arrange loaded weights for the products of the device."""
        for module in self.modules():
            if isinstance(module, Matrix | MLA):
                module.pack()

    def targets(self) -> Iterator[Target]:
        """Yield the targets of all weights, for the loader."""
        for module in self.modules():
            if isinstance(module, Matrix | Vector):
                yield from module.targets()
