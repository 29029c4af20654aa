"""The form of attention of each sequence of a step: absorbed or expanded, dense or sparse."""

from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.settings import EngineConfig


@dataclass(frozen=True, slots=True)
class AbsorbRule:
    """The rule for a sequence, by the numbers of its new and cached tokens.

    Attributes:
        max_queries: a sequence with at most this number of new tokens attends straight to the
            cached entries (absorbed); with more, they are expanded to keys and values once for all
            its queries.
        index_topk: a token that sees more keys than this attends to the `index_topk` keys that the
            indexer selects for it. Each token selects others, so such sequences are never expanded.
            None without an indexer.
    """

    max_queries: int
    index_topk: int | None = None

    @classmethod
    def make(cls, config: ModelConfig, settings: EngineConfig) -> "AbsorbRule":
        """Return the rule for a model and its settings."""
        if settings.attn_impl == "naive":  # decode steps only: a token and its drafts
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
