"""The size of a step: the numbers that determine its roofline floor and predicted time."""

from dataclasses import dataclass

from dsv3.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The work of one step in each dp group.

    Attributes:
        decode: decoding sequences; each adds `queries` tokens to `context` cached positions.
        prefill: new tokens of all `prompts` prompts; each has `cached` positions before them.
        rows: rows of logits; None means all decode tokens and one row per prompt.
        hit: number of local experts reached and rows routed to them, if counted.
    """

    decode: int = 0
    context: int = 0
    queries: int = 1
    prefill: int = 0
    prompts: int = 1
    cached: int = 0
    rows: int | None = None
    hit: tuple[float, float] | None = None

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
