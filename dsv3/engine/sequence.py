"""A request in progress: its tokens, how far it is computed, the pages it holds."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dsv3.cache.prefix import Match
from dsv3.cache.tiers import PageKey
from dsv3.engine.adjust import Adjuster
from dsv3.engine.constraint import Constraint
from dsv3.engine.grams import GramIndex
from dsv3.engine.step_plan import CHOICE
from dsv3.request import Completion, Request, SamplingParams, TokenLogprobs
from dsv3.text.detokenize import TextStream


def pack_choice(params: SamplingParams, answer: int = 0) -> bytes:
    """Return the sampling parameters of a row as bytes of `CHOICE`."""
    seed_low, seed_high = np.array([params.seed], np.int64).view(np.int32).tolist()
    choice = np.zeros(1, CHOICE)
    choice["top_k"] = min(params.top_k, 2**31 - 1)
    choice["seed_low"] = seed_low
    choice["seed_high"] = seed_high
    choice["answer"] = answer
    choice["temperature"] = params.temperature
    choice["top_p"] = params.top_p
    choice["min_p"] = params.min_p
    return choice.tobytes()


class PendingToken(NamedTuple):
    """The row of a step in flight that samples a token; rows are counted in the group."""

    step: int
    row: int


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request between steps.

    Planning runs ahead of results by at most one step: `num_computed` counts the planned
    tokens, `num_committed` those with results. Drafts are planned tokens until a step rejects them;
    while a sequence is drafted, no planning runs ahead.

    Attributes:
        arrival: order of arrival; priority and arrival decide which sequence goes first.
        added_at, first_token_at: `time.monotonic()` at its arrival, and at its first token.
        stream: turns tokens into text; None without a tokenizer.
        group: the data-parallel group that computes it.
        num_uncached: tokens of its prompt that this group must compute, as far as was known when
            it came.
        token_ids: the prompt, then the generated tokens.
        pending: the token after `token_ids`, while it is in flight.
        pages: its page table, as the 32-bit words that plans are made of.
        match: its cached prefix when it was last looked up while waiting.
        num_cached: prompt tokens whose entries were found in the cache.
        num_scored: prompt tokens, from the second on, whose scores have been planned.
        num_preempted: times that it lost its pages.
        times_skipped: later requests that were admitted before it.
        expires: `time.monotonic()` at which it ends as it is.
        disk_wait_until: `time.monotonic()` until which it waits for its prefix from disk.
        adjuster: its biases and penalties; None if its logits stay as they are.
        constraint: the tokens that may come next; None if all may.
        drafts: tokens drafted after `token_ids`, to be verified by the next step.
        num_undrafted: its computed tokens that have no entry in the MTP layer's cache.
        grams: index of its tokens that drafts are taken from; None before the first draft.
        choice: its sampling parameters as bytes of `CHOICE`.
        page_keys: names of its full pages in the cache's lower tiers, as far as asked for.
    """

    request: Request
    arrival: int
    added_at: float
    stream: TextStream | None
    group: int = 0
    num_uncached: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_committed: int = 0
    pending: PendingToken | None = None
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    match: Match | None = None
    num_cached: int | None = None
    num_scored: int = 0
    num_preempted: int = 0
    times_skipped: int = 0
    first_token_at: float | None = None
    expires: float | None = None
    disk_wait_until: float | None = None
    is_running: bool = False
    is_done: bool = False
    page_keys: list[PageKey] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    adjuster: Adjuster | None = None
    constraint: Constraint | None = None
    drafts: list[int] = field(default_factory=list)
    num_undrafted: int = 0
    grams: GramIndex | None = None
    choice: bytes = b""

    def __post_init__(self) -> None:
        """Start from the prompt."""
        request = self.request
        p = self.request.params
        self.token_ids = list(request.prompt_ids)
        self.adjuster = Adjuster.of(p, request.prompt_ids, is_masked=self.constraint is not None)
        self.choice = pack_choice(p, request.answer)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: lower goes first."""
        return self.request.priority, self.arrival

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_left(self) -> int:
        """Tokens that could be computed next.

        0 when the step in flight may be the last, or the next one depends on its result.
        """
        waiting = 0 if self.pending is None else 1
        if waiting and self.constraint is not None:
            return 0  # the mask of the next token depends on the one in flight
        if waiting and self.num_generated + waiting >= self.request.params.max_tokens:
            return 0
        return len(self.token_ids) + waiting - self.num_computed

    @property
    def reuse_limit(self) -> int:
        """Leading tokens that may be taken from the cache.

        The last token is always computed, for its logits; a prompt that is scored needs the
        logits of all its tokens.
        """
        if self.request.params.prompt_logprobs is not None:
            return min(self.num_scored, len(self.token_ids) - 1)
        return len(self.token_ids) - 1

    def completion(self, reason: str, error: str) -> Completion:
        """Return the answer as it is; `reason` is why it ends, `error` is empty if it succeeded."""
        request = self.request
        params = request.params
        constraint = self.constraint
        return Completion(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            token_ids=self.token_ids[self.prompt_len :],
            text="" if self.stream is None else self.stream.text,
            finish_reason=reason,
            logprobs=None if params.logprobs is None else self.logprobs,
            prompt_logprobs=None if params.prompt_logprobs is None else self.prompt_logprobs,
            cached_tokens=self.num_cached or 0,
            stop_string=None if self.stream is None else self.stream.stop_string,
            error=error,
            is_refused=bool(error) and constraint is not None and error == constraint.error,
            index=request.answer,
        )

    def rewind(self) -> None:
        """Reset the computed positions after a preemption; the tokens stay."""
        self.pages = array("i")
        self.drafts = []
        self.num_undrafted = 0
        self.num_computed = 0
        self.num_committed = 0
        self.is_running = False
        self.num_preempted += 1
