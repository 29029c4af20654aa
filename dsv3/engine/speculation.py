"""Speculation: where drafts come from, and how many a sequence may have."""

from dataclasses import dataclass

from dsv3.checkpoint.reader import Source
from dsv3.engine.grams import GramIndex
from dsv3.engine.sequence import Sequence
from dsv3.errors import ConfigError
from dsv3.parallel.expert_placement import Placement
from dsv3.settings import EngineConfig

# A sequence is not drafted if more of its tokens have no entry in the MTP layer's cache (they were
# computed by steps without drafts): the layer would guess from a text with a hole.
_MOST_UNDRAFTED = 32


@dataclass(frozen=True, slots=True)
class Speculation:
    """How tokens are drafted.

    Attributes:
        num_drafts: most drafts of a sequence in a step; 0 drafts nothing.
        has_mtp: the MTP layer makes the first draft; without it, all drafts come from the text.
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

    def next_drafts(self, seq: Sequence, by_mtp: list[int]) -> list[int]:
        """Return the drafts after a sequence's tokens, for its next step.

        The MTP layer was trained to predict one token from the model's output. Its further drafts
        are less certain than the continuation of an earlier occurrence.

        Args:
            seq: the sequence.
            by_mtp: drafts of the MTP layer; empty if there is no layer, or if it made none.
        """
        count = self.limit(seq)
        if count <= 0 or (self.has_mtp and not by_mtp):
            return []
        if seq.grams is None:
            seq.grams = GramIndex()
        first = by_mtp[:1]
        found = seq.grams.continuation(seq.token_ids, first, count - len(first))
        return [*first, *found, *by_mtp[1 + len(found) :]][:count]

    def limit(self, seq: Sequence) -> int:
        """Return the most drafts of a sequence in a step.

        It is 0 with penalties: they change the logits of a position by the tokens before it, of
        which drafts would be some.
        """
        params = seq.request.params
        if params.has_penalties or seq.num_undrafted > _MOST_UNDRAFTED:
            return 0
        if params.speculative_tokens is None:
            return self.num_drafts
        return min(self.num_drafts, params.speculative_tokens)


NO_DRAFTS = Speculation()
