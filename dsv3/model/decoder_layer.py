"""A layer of the decoder: attention and feed-forward part, each after a norm."""

from torch import Tensor

from dsv3.cache.pool import LayerCache
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.model.attention import MLA
from dsv3.model.batch import Batch
from dsv3.model.moe import MoE, feed_forward
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch
from dsv3.parallel.module import Module
from dsv3.parallel.sequence_parallel import SequenceParallel
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Vector
from dsv3_kernels import Rotation


class DecoderLayer(Module):
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
