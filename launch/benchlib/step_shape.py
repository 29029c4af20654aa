"""The size of a step: the numbers that determine its roofline floor and predicted time."""

from dataclasses import dataclass

import numpy as np

from dsv3.engine.step_plan import Ints, StepPlan


@dataclass(frozen=True, slots=True)
class ExpertHits:
    """The use of one rank's experts in a step of a layer.

    Attributes:
        experts: experts that tokens reach.
        rows: rows routed to them.
    """

    experts: float
    rows: float


@dataclass(frozen=True, slots=True)
class StepKind:
    """A step in which sequences of `context` cached tokens get `new` tokens each."""

    batch: int
    context: int
    new: int

    @property
    def name(self) -> str:
        """The step in reports, without its context."""
        return f"decode {self.batch}" if self.is_decode else f"prefill {self.new}"

    @property
    def is_decode(self) -> bool:
        """True if each sequence gets one token."""
        return self.new == 1

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.new

    @property
    def length(self) -> int:
        """Tokens of each sequence after the step."""
        return self.context + self.new

    def plan(self, token_ids: Ints, page_size: int) -> StepPlan:
        """Return a greedy plan of the step, whose sequences fill the pages from the first one."""
        pages = -(-self.length // page_size)
        pages_BG = np.arange(1, 1 + self.batch * pages, dtype=np.int32).reshape(self.batch, pages)
        return StepPlan.greedy(token_ids, np.full(self.batch, self.context, np.int32), pages_BG)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The work of one step in each dp group.

    Attributes:
        decode: decoding sequences; each adds `queries` tokens to `context` cached positions.
        prefill: new tokens of all `prompts` prompts; each has `cached` positions before them.
        rows: rows of logits; None means all decode tokens and one row per prompt.
        hits: use of the rank's experts; None means the mean of random routing.
    """

    decode: int = 0
    context: int = 0
    queries: int = 1
    prefill: int = 0
    prompts: int = 1
    cached: int = 0
    rows: int | None = None
    hits: ExpertHits | None = None

    @property
    def tokens(self) -> int:
        """New tokens of a group."""
        return self.decode * self.queries + self.prefill

    @property
    def num_rows(self) -> int:
        """Rows of logits of a group."""
        if self.rows is not None:
            return self.rows
        return self.decode * self.queries + (self.prompts if self.prefill else 0)

    @classmethod
    def of_plan(cls, plan: StepPlan, decode_limit: int) -> "StepShape":
        """Return the shape of a dp group's plan, with mean context lengths.

        Args:
            plan: the group's plan.
            decode_limit: most new tokens of a sequence that counts as decoding.
        """
        is_decode = plan.query_len <= decode_limit
        decode_len = plan.query_len[is_decode]
        decode_context = plan.context_len[is_decode]
        prefill_len = plan.query_len[~is_decode]
        prefill_context = plan.context_len[~is_decode]
        return cls(
            decode=len(decode_len),
            context=int(decode_context.sum()) // max(1, len(decode_len)),
            queries=max(1, round(int(decode_len.sum()) / max(1, len(decode_len)))),
            prefill=int(prefill_len.sum()),
            prompts=max(1, len(prefill_len)),
            cached=int(prefill_context.sum()) // max(1, len(prefill_len)),
            rows=len(plan.row),
        )
