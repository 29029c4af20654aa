"""V3.2's lightning indexer: its weights only, replicated on all ranks.

Up to index_topk cached tokens the indexer selects all of them, so attention is exactly dense; the
engine does not admit longer contexts for these models.
"""

from torch import nn

from dsv3.config import ModelConfig
from dsv3.parallel.linear import Linear
from dsv3.parallel.weights import Vector, WeightFormat


class Indexer(nn.Module):
    """Weights of one layer's indexer."""

    def __init__(self, config: ModelConfig, prefix: str, fmt: WeightFormat) -> None:
        super().__init__()
        assert config.index_n_heads and config.index_head_dim and config.q_lora_rank
        heads = config.index_n_heads
        dim = config.index_head_dim
        self.wq_b = Linear(prefix, {"wq_b": heads * dim}, config.q_lora_rank, fmt)
        self.wk = Linear(prefix, {"wk": dim}, config.hidden_size, fmt)
        self.k_norm = Vector(f"{prefix}k_norm.weight", (dim,), fmt)
        self.k_norm_bias = Vector(f"{prefix}k_norm.bias", (dim,), fmt)
        self.weights_proj = Linear(
            prefix, {"weights_proj": heads}, config.hidden_size, fmt, quantized=False
        )
