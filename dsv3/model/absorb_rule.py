"""Which sequences of a step attend to the cached entries themselves, and which expand them."""

from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.settings import EngineConfig


@dataclass(frozen=True, slots=True)
class AbsorbRule:
    """The rule for a sequence, by the numbers of its new and cached tokens.

    Attributes:
        max_queries: a sequence with at most this number of new tokens attends straight to the
            cache.
        index_topk: tokens that see more keys attend to this number of them, chosen by the indexer.
            Each of them reads other entries, so there is nothing to expand once for all. None
            without an indexer.
    """

    max_queries: int
    index_topk: int | None = None

    @classmethod
    def make(cls, config: ModelConfig, settings: EngineConfig) -> "AbsorbRule":
        """Return the rule for a model and its settings."""
        if settings.attn_impl == "naive":
            limit = 1 + settings.speculative_tokens
        elif settings.attn_impl == "absorb":
            limit = config.max_position_embeddings
        else:
            limit = absorb_limit(config)
        return cls(limit, config.index_topk)

    def selects(self, num_keys: int) -> bool:
        """Return True if a token that sees this number of keys attends to selected ones only."""
        return self.index_topk is not None and num_keys > self.index_topk

    def absorbs(self, num_new: int, num_cached: int) -> bool:
        """Return True if a sequence attends straight to the cache."""
        return num_new <= self.max_queries or self.selects(num_cached + num_new)


def absorb_limit(config: ModelConfig) -> int:
    """Return the number of query tokens of a sequence up to which absorption takes fewer FLOPs.

    Per head and key, expansion costs C (N + V) once; absorption costs 2 C - N - V more per query.
    """
    extra = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
    if extra <= 0:
        return 1
    heads_dim = config.qk_nope_head_dim + config.v_head_dim
    return max(1, config.kv_lora_rank * heads_dim // extra)
