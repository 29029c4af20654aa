"""Multi-token prediction: a layer that predicts the token after the next one.

    x_i = W_eh [enorm(embed(t_{i+1})) ; hnorm(h_i)], then a decoder layer with a cache of its own

where h_i is the main model's output at position i, after its final norm. The head is the main
model's. So the layer's cache entry of position i depends on the token after it. To predict further
tokens the layer is applied again: the position becomes the next one, t the token predicted last,
and h the layer's own normalized output.

The paper has the two halves of the concatenation the other way round; the published weights have
the embedding first. Its embedding and head are copies of the main model's, and not loaded.

Source: DeepSeek-V3 report, section 2.2, eq. 21.
"""

import torch
from torch import Tensor

from dsv3.cache.pool import LayerCache
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.model.batch import Batch
from dsv3.model.decoder_layer import DecoderLayer
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch
from dsv3.parallel.linear import Linear
from dsv3.parallel.module import Module
from dsv3.parallel.sequence_parallel import SequenceParallel
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Vector
from dsv3_kernels import Rotation, rmsnorm


class MTP(Module):
    """The first MTP layer of a model; further ones are not used."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        fmt: WeightFormat,
        dispatch: ExpertDispatch,
        side: SideStream,
    ) -> None:
        super().__init__()
        index = config.num_hidden_layers
        prefix = f"model.layers.{index}."
        hidden = config.hidden_size
        self.tp = mesh.tp
        self.eps = config.rms_norm_eps
        self.enorm = Vector(f"{prefix}enorm.weight", (hidden,), fmt)
        self.hnorm = Vector(f"{prefix}hnorm.weight", (hidden,), fmt)
        self.eh_proj = Linear(prefix, {"eh_proj": hidden}, 2 * hidden, fmt, quantized=False)
        self.layer = DecoderLayer(config, index, mesh, fmt, dispatch, side)
        self.norm = Vector(f"{prefix}shared_head.norm.weight", (hidden,), fmt)

    def forward(
        self, h_TD: Tensor, e_TD: Tensor, rotation: Rotation, batch: Batch, cache: LayerCache
    ) -> Tensor:
        """Return normalized hidden states [T, D]: input of the head, and of the next application.

        Args:
            h_TD: hidden states of the tokens: the main model's, or this method's.
            e_TD: embeddings of the tokens after them.
            rotation: of the tokens' positions.
            batch: the tokens; their ids do not matter.
            cache: of the layer.
        """
        e_TD = rmsnorm(e_TD, self.enorm.weight, self.eps)
        x_TD = self.eh_proj(torch.cat((e_TD, rmsnorm(h_TD, self.hnorm.weight, self.eps)), -1))
        rows = SequenceParallel(self.tp, len(x_TD), is_split=False)
        x_TD, y_TD = self.layer(x_TD, None, rotation, batch, cache, rows)
        _, h_TD, _ = rows.sum_norm(x_TD, y_TD, self.norm.weight, self.eps, quant=False, ue8m0=False)
        return h_TD
