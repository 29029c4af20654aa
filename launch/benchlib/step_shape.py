"""The size of a step: the numbers that its floor and its predicted time depend on."""

from dataclasses import dataclass

from dsv3.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What one step computes in every dp group.

    Attributes:
        decode: sequences that add `queries` tokens each to `context` cached ones.
        prefill: new tokens of `prompts` prompts together, each with `cached` positions before.
        rows: rows of logits; None for all decode tokens and one of every prompt.
        hit: local experts and their rows, where they were counted.
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
        """Return the shape of a group's plan; contexts as their mean.

        Args:
            plan: of the group.
            decode_limit: new tokens up to which a sequence counts as decoding.
        """
        is_short = plan.query_len <= decode_limit
        short, long = plan.query_len[is_short], plan.query_len[~is_short]
        short_context, long_context = plan.context_len[is_short], plan.context_len[~is_short]
        return cls(
            decode=len(short),
            context=int(short_context.sum()) // max(1, len(short)),
            queries=max(1, round(int(short.sum()) / max(1, len(short)))),
            prefill=int(long.sum()),
            prompts=max(1, len(long)),
            cached=int(long_context.sum()) // max(1, len(long)),
            rows=len(plan.row),
        )
