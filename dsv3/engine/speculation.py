"""Speculation: how many tokens are drafted for a sequence, and drafts from the text itself."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from dsv3.checkpoint.reader import Source
from dsv3.engine.grams import GramIndex
from dsv3.engine.sequence import Sequence
from dsv3.errors import ConfigError
from dsv3.parallel.expert_placement import Placement
from dsv3.settings import EngineConfig

# Tokens without an entry in the MTP layer's cache beyond which a sequence is not drafted.
_MOST_UNDRAFTED = 32


@dataclass(frozen=True, slots=True)
class Speculation:
    """How tokens are drafted.

    Attributes:
        num_drafts: most drafts of a sequence in a step; 0 drafts nothing.
        has_mtp: the MTP layer drafts; else earlier occurrences in the text do.
    """

    num_drafts: int = 0
    has_mtp: bool = False

    @classmethod
    def decide(
        cls, settings: EngineConfig, source: Source, placement: Placement | None
    ) -> "Speculation":
        """Return how a model's tokens are drafted.

        Raises:
            ConfigError: the MTP layer is asked for, and there is none, or it cannot be used.
        """
        count = settings.speculative_tokens
        if not count or settings.speculative_method == "ngram":
            return cls(count)
        layer = source.config.num_hidden_layers
        is_stored = f"model.layers.{layer}.eh_proj.weight" in source.tensors
        method = settings.given("speculative_method")
        if not is_stored:
            if settings.speculative_method == "mtp":
                name = f"model.layers.{layer}"
                raise ConfigError(f"{source.path}: no MTP layer ({name}) for {method}")
            return cls(count)
        if placement is not None and placement.num_physical > source.config.n_routed_experts:
            name = settings.named("speculative_method")
            raise ConfigError(
                f"the MTP layer has no redundant experts; use {name}=ngram, or no redundant experts"
            )
        return cls(count, has_mtp=True)

    def next_drafts(self, seq: Sequence, drafted: list[int]) -> list[int]:
        """Return the drafts after a sequence's tokens, for its next step.

        The MTP layer was trained to predict one token from the model's output. Its further drafts
        are less certain than the continuation of an earlier occurrence.

        Args:
            seq: the sequence.
            drafted: by the MTP layer; empty without one.
        """
        count = self.limit(seq)
        if count <= 0 or (self.has_mtp and not drafted):
            return []
        first = drafted[:1]
        seq.grams = seq.grams or GramIndex()
        found = seq.grams.continuation(seq.token_ids, first, count - len(first))
        return [*first, *found, *drafted[1 + len(found) :]][:count]

    def limit(self, seq: Sequence) -> int:
        """Return the most drafts of a sequence in a step.

        Penalties depend on the tokens before a position, of which drafts would be some.
        """
        params = seq.request.params
        if params.has_penalties or seq.num_undrafted > _MOST_UNDRAFTED:
            return 0
        if params.speculative_tokens is None:
            return self.num_drafts
        return min(self.num_drafts, params.speculative_tokens)


NO_DRAFTS = Speculation()


def count_matches(drafts: Ordered[int], tokens: Ordered[int]) -> int:
    """Return the number of drafts before the first one that differs from the sampled token."""
    count = 0
    for draft, token in zip(drafts, tokens, strict=False):
        if draft != token:
            break
        count += 1
    return count
