"""Results of a step: sampled tokens and log-probabilities, on the device and on the host."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.engine.step_plan import NOT_FINITE
from dsv3.request import TokenLogprobs


@dataclass(frozen=True)
class StepResult:
    """Results of a step on the device, where the next step may already use them.

    Attributes:
        token_M: [M] int64 sampled tokens or scored targets; NOT_FINITE where the logits are not.
        scores: [M, 1 + 2 L] float64: log-probability of the token, ids of the L likeliest tokens,
            their log-probabilities; None if no row asked for any.
        draft_NK: [N, K] int64 drafts of the tokens after the last accepted one, by the order of the
            plans; None if none were made.
        bad_layer: the first layer of this rank's group whose output is not finite; looked for
            with --debug only, and not in steps that are CUDA graphs.
        fetched: host pages that have come from disk on all ranks (True), or which some rank
            could not read (False).
        sent: event after which a copy to the host is complete; None if no copy was
            started.
    """

    token_M: Tensor
    scores: Tensor | None = None
    draft_NK: Tensor | None = None
    bad_layer: int | None = None
    fetched: dict[int, bool] = field(default_factory=dict)
    sent: torch.cuda.Event | None = None

    def send(self) -> "StepResult":
        """Start copying to the host, after this step and before any that is launched later."""
        if not self.token_M.is_cuda:
            return self
        # Copies that nothing waits for go to pinned memory.
        token_M = self.token_M.to("cpu", non_blocking=True)
        scores = None if self.scores is None else self.scores.to("cpu", non_blocking=True)
        draft_NK = None if self.draft_NK is None else self.draft_NK.to("cpu", non_blocking=True)
        sent = torch.cuda.current_stream().record_event()
        return replace(self, token_M=token_M, scores=scores, draft_NK=draft_NK, sent=sent)

    def to_host(self) -> "HostResult":
        """Wait for the step and return its results as arrays."""
        if self.sent is not None:
            self.sent.synchronize()
        token_M = self.token_M.cpu().numpy()
        drafts = [] if self.draft_NK is None else self.draft_NK.tolist()
        if self.scores is None:
            no_logprob_M = np.zeros(len(token_M))
            no_top_ML = np.zeros((len(token_M), 0))
            no_ids_ML = no_top_ML.astype(np.int64)
            return HostResult(token_M, no_logprob_M, no_ids_ML, no_top_ML, drafts, self.bad_layer)
        scores = self.scores.cpu().numpy()
        num_top = (scores.shape[1] - 1) // 2
        return HostResult(
            token=token_M,
            logprob=scores[:, 0],
            top_token=scores[:, 1 : 1 + num_top].astype(np.int64),
            top_logprob=scores[:, 1 + num_top :],
            drafts=drafts,
            bad_layer=self.bad_layer,
        )


@dataclass(frozen=True)
class HostResult:
    """Results of a step on the host, one row after the other in the order of the plans.

    Attributes:
        token: [M] the sampled token, or the scored target; NOT_FINITE if there is neither.
        logprob: [M] its log-probability under the model; 0 where none was asked for.
        top_token, top_logprob: [M, L] the likeliest tokens, best first.
        drafts: K drafts of each drafted sequence; empty if none were made.
        bad_layer: see `StepResult`.
    """

    token: NDArray[np.int64]
    logprob: NDArray[np.float64]
    top_token: NDArray[np.int64]
    top_logprob: NDArray[np.float64]
    drafts: list[list[int]] = field(default_factory=list)
    bad_layer: int | None = None

    @cached_property
    def is_finite(self) -> bool:
        """True if the logits of all rows are finite."""
        return bool((self.token != NOT_FINITE).all())

    def logprobs_of(self, row: int, num_top: int) -> TokenLogprobs:
        """Return the log-probability of a row's token, and the `num_top` likeliest tokens."""
        top_tokens = self.top_token[row, :num_top].tolist()
        top_logprobs = self.top_logprob[row, :num_top].tolist()
        alternatives = tuple(zip(top_tokens, top_logprobs, strict=True))
        return TokenLogprobs(int(self.token[row]), float(self.logprob[row]), alternatives)
