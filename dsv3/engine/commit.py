"""The commit of a step: results become tokens and text of the requests, and end some of them."""

import logging
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from dsv3.engine.drafting import Drafting
from dsv3.engine.metrics import Metrics
from dsv3.engine.scheduled import ScheduledSeq
from dsv3.engine.scheduler import Scheduler
from dsv3.engine.sequence import Sequence
from dsv3.engine.step_plan import NOT_FINITE
from dsv3.engine.step_result import HostResult, StepResult
from dsv3.request import RequestOutput

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose results have not been committed."""

    number: int
    parts: list[ScheduledSeq]
    result: StepResult


class Committer:
    """Records the results of steps, on rank 0.

    Args:
        sequences: the unfinished ones by the id of their request; finished ones are removed.
        schedulers: of each data-parallel group.
        drafting: verifies drafts, and makes the next ones.
        metrics: counts tokens and times.
        eos_ids: the tokens that end an answer.
    """

    def __init__(
        self,
        sequences: dict[str, Sequence],
        schedulers: Ordered[Scheduler],
        drafting: Drafting,
        metrics: Metrics,
        eos_ids: frozenset[int],
    ) -> None:
        self._sequences = sequences
        self._schedulers = schedulers
        self._drafting = drafting
        self._metrics = metrics
        self._eos_ids = eos_ids
        self._now = 0.0  # when the results came, by `time.monotonic()`

    def commit(self, step: LaunchedStep, result: HostResult, now: float) -> list[RequestOutput]:
        """Record a step's results; return the outputs, request by request."""
        self._now = now
        outputs = (self._commit(part, step.number, result) for part in step.parts)
        return [output for output in outputs if output is not None]

    def expire(self, seq: Sequence, now: float) -> RequestOutput:
        """End a sequence as it is, because its deadline has passed."""
        self._now = now
        return self._finish(seq, "deadline", RequestOutput(request_id=seq.request.request_id))

    def _commit(self, part: ScheduledSeq, number: int, result: HostResult) -> RequestOutput | None:
        """Record the results of one sequence; return its next output."""
        seq = part.seq
        if seq.is_done:
            return None
        self._drafting.verify(part, result)
        sampled_row = part.sampled_row
        rows = slice(part.first_row, sampled_row + max(1, part.num_samples))
        if not result.is_finite and (result.token[rows] == NOT_FINITE).any():
            return self._fail(seq, number, result.bad_layer)
        is_decode = part.num_known == 1 and part.start >= seq.prompt_len
        if is_decode:
            self._metrics.decode_tokens += part.num_tokens
        else:
            self._metrics.prefill_tokens += part.num_tokens
        self._schedulers[seq.group].commit(part)
        num_top = seq.request.params.prompt_logprobs or 0
        for row in range(part.first_row, sampled_row):
            seq.prompt_logprobs.append(result.logprobs_of(row, num_top))
        if not part.is_last:
            return None
        out = RequestOutput(request_id=seq.request.request_id)
        if not part.num_samples:
            return self._finish(seq, "length", out)
        if seq.pending is not None and seq.pending.step == number:
            seq.pending = None
        for row in range(sampled_row, sampled_row + part.num_samples):
            self._append(seq, result, row, out)
            if out.completion is not None:
                return out
        seq.drafts = self._drafting.next_drafts(part, result)
        return out

    def _append(self, seq: Sequence, result: HostResult, row: int, out: RequestOutput) -> None:
        """Add a sampled token to the output; finish the sequence if it was the last."""
        token = int(result.token[row])
        params = seq.request.params
        if seq.first_token_at is None:
            seq.first_token_at = self._now
            self._metrics.first_token_seconds.observe(self._now - seq.added_at)
        is_end = token in params.stop_token_ids or (
            token in self._eos_ids and not params.ignore_eos
        )
        if is_end:
            error = "" if seq.constraint is None else seq.constraint.finish(seq.token_ids)
            self._finish(seq, "error" if error else "stop", out, error=error)
            return
        seq.token_ids.append(token)
        out.new_token_ids.append(token)
        self._metrics.answer_tokens += 1
        if params.logprobs is not None:
            logprobs = result.logprobs_of(row, params.logprobs)
            seq.logprobs.append(logprobs)
            out.new_logprobs.append(logprobs)
        stopped = False
        if seq.stream is not None:
            text, stopped = seq.stream.push(token)
            out.new_text += text
        if stopped:
            self._finish(seq, "stop", out, flush=False)
        elif seq.num_generated >= params.max_tokens:
            self._finish(seq, "length", out)

    def _fail(self, seq: Sequence, step: int, layer: int | None) -> RequestOutput:
        """End a sequence whose logits are not finite; the layer is known with --debug."""
        where = "" if layer is None else f" (step {step}, from layer {layer} on)"
        error = f"the model's logits are not finite{where}: a weight or an activation overflowed"
        log.debug("%s: %s", seq.request.request_id, error)
        self._schedulers[seq.group].withdraw(seq)
        out = RequestOutput(request_id=seq.request.request_id)
        return self._finish(seq, "error", out, error=error)

    def _finish(
        self,
        seq: Sequence,
        reason: str,
        out: RequestOutput,
        flush: bool = True,
        error: str = "",
    ) -> RequestOutput:
        if flush and seq.stream is not None:
            out.new_text += seq.stream.finish()
        out.completion = seq.completion(reason, error)
        del self._sequences[seq.request.request_id]
        self._schedulers[seq.group].remove(seq)
        self._metrics.requests += 1
        if seq.first_token_at is not None and seq.num_generated > 1:
            seconds = self._now - seq.first_token_at
            self._metrics.token_seconds.observe(seconds / (seq.num_generated - 1))
        return out
