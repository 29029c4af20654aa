"""The step plan: everything the ranks must know to run one step, in one small integer buffer.

Rank 0 makes it and every rank executes it. It has a section for each data-parallel group; every
rank reads all sections for the sizes of the exchanges. Floats travel as their bits.
"""

from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from dsv3.cache.tiers import PageKey
from dsv3.distributed.collectives import Collectives
from dsv3.distributed.watchdog import Watchdog
from dsv3.errors import RankError

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

# Words of one broadcast; longer plans need a second one.
_FIRST_WORDS = 4096
_PAUSE = -1

NO_TARGET = -1
NOT_FINITE = -1  # instead of a sampled or scored token whose logits are NaN or infinite
_HASH_WORDS = 4

# The sampling parameters of a row; the names are fields of `StepPlan`.
CHOICE = np.dtype(
    [
        ("top_k", np.int32),
        ("seed_low", np.int32),
        ("seed_high", np.int32),
        ("answer", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
    ]
)


# Arrays without elements can be shared.
_NO_INTS = np.zeros(0, np.int32)
_NO_FLOATS = np.zeros(0, np.float32)


def _ints() -> Ints:
    return _NO_INTS


def _floats() -> Floats:
    return _NO_FLOATS


@dataclass
class StepPlan:
    """One group's flat batch, perhaps empty.

    Sequences that attend straight to the cache come first (see `AbsorbRule`), and within both kinds
    those with fewer new tokens.

    Attributes:
        copies: [2 N] pages to copy before anything is written: all sources, then all
            destinations.
        offload: [2 N] pages to keep in host memory before that: all pages, then the host pages.
        restore: [2 N] pages to bring back from there after it: all host pages, then the pages.
        store: pages to write from host memory to disk, as `pack_pages` has them. They are read
            before anything is written.
        fetch: pages to read from disk into host memory, in the background.
        confirm_fetched: [1 + N] milliseconds to wait, then host pages: all ranks report which of
            them they have read.
        token_ids: [T] new tokens of all sequences, one after the other; -1 - m is the token that
            row m of the previous step has sampled.
        query_len: [B] new tokens of each sequence, drafts included.
        context_len: [B] positions already cached before this step.
        page_count: [B] pages of each sequence, covering context and new tokens.
        pages: their page tables, one after the other.
        row: [M] rows of the batch whose logits are wanted.
        position: [M] position of the token that these logits predict.
        target: [M] the token to score there, or NO_TARGET to sample one.
        top_logprobs: [M] likeliest tokens to report; -1 reports no probabilities at all.
        temperature, top_k, top_p, min_p: [M] as in SamplingParams.
        seed_low, seed_high: [M] the two halves of the request's seed.
        answer: [M] as in Request.
        next_ids: [T] the token after each new token, for the MTP layer; -1 - m is the token that
            row m of this step samples. Empty without an MTP layer.
        draft_row: [N] for each sequence that the MTP layer drafts, the row of the batch with its
            last known token; the rows after it hold the drafts to verify.
        draft_result: [N] the result of that row: m, an index of `row`.
        draft_checked: [N] drafts to verify.
        num_drafts: [1] drafts to make for each of the N sequences; empty if the layer does not run.
        adjust: biases and penalties, packed as `Adjustments`; empty if no row has any.
    """

    copies: Ints = field(default_factory=_ints)
    offload: Ints = field(default_factory=_ints)
    restore: Ints = field(default_factory=_ints)
    store: Ints = field(default_factory=_ints)
    fetch: Ints = field(default_factory=_ints)
    confirm_fetched: Ints = field(default_factory=_ints)
    token_ids: Ints = field(default_factory=_ints)
    query_len: Ints = field(default_factory=_ints)
    context_len: Ints = field(default_factory=_ints)
    page_count: Ints = field(default_factory=_ints)
    pages: Ints = field(default_factory=_ints)
    row: Ints = field(default_factory=_ints)
    position: Ints = field(default_factory=_ints)
    target: Ints = field(default_factory=_ints)
    top_logprobs: Ints = field(default_factory=_ints)
    top_k: Ints = field(default_factory=_ints)
    seed_low: Ints = field(default_factory=_ints)
    seed_high: Ints = field(default_factory=_ints)
    answer: Ints = field(default_factory=_ints)
    next_ids: Ints = field(default_factory=_ints)
    draft_row: Ints = field(default_factory=_ints)
    draft_result: Ints = field(default_factory=_ints)
    draft_checked: Ints = field(default_factory=_ints)
    num_drafts: Ints = field(default_factory=_ints)
    adjust: Ints = field(default_factory=_ints)
    temperature: Floats = field(default_factory=_floats)
    top_p: Floats = field(default_factory=_floats)
    min_p: Floats = field(default_factory=_floats)

    @classmethod
    def greedy(cls, token_ids: Ints, context_len: Ints, pages_BG: Ints) -> "StepPlan":
        """Return a greedy step; all sequences have the same number of new tokens."""
        count = len(context_len)
        zeros_B = np.zeros(count, np.int32)
        new = len(token_ids) // count
        return cls(
            token_ids=token_ids,
            query_len=np.full(count, new, np.int32),
            context_len=context_len,
            page_count=np.full(count, pages_BG.shape[1], np.int32),
            pages=pages_BG.ravel(),
            row=np.arange(1, count + 1, dtype=np.int32) * new - 1,
            position=context_len + np.int32(new),
            target=np.full(count, NO_TARGET, np.int32),
            top_logprobs=np.full(count, -1, np.int32),
            top_k=zeros_B,
            seed_low=zeros_B,
            seed_high=zeros_B,
            answer=zeros_B,
            temperature=np.zeros(count, np.float32),
            top_p=np.ones(count, np.float32),
            min_p=np.zeros(count, np.float32),
        )

    @property
    def seed(self) -> NDArray[np.int64]:
        """Seeds of the requests, [M]."""
        return self.seed_high.astype(np.int64) << 32 | self.seed_low.view(np.uint32)

    def pack(self) -> Ints:
        """Return all arrays as one int32 buffer: their lengths, then their words."""
        arrays = [getattr(self, name) for name in _DTYPES]
        lengths = np.array([len(a) for a in arrays], np.int32)
        return np.frombuffer(b"".join(a.tobytes() for a in (lengths, *arrays)), np.int32)

    @classmethod
    def unpack(cls, words: Ints) -> "StepPlan":
        """Undo `pack`."""
        at = len(_DTYPES)
        arrays: dict[str, Any] = {}
        for (name, dtype), length in zip(_DTYPES.items(), words[:at].tolist(), strict=True):
            if length:
                arrays[name] = words[at : at + length].view(dtype)
                at += length
        return cls(**arrays)


# Of the fields, in order.
_DTYPES = {
    f.name: np.float32 if f.default_factory is _floats else np.int32 for f in fields(StepPlan)
}


def num_drafts_of(plans: list[StepPlan]) -> int:
    """Return the drafts that a step makes for each of its drafted sequences, in all groups."""
    return max((int(plan.num_drafts[0]) for plan in plans if len(plan.num_drafts)), default=0)


def pack_pages(pages: list[tuple[int, PageKey]]) -> Ints:
    """Return (host page, key) pairs as words: their number, the host pages, the keys."""
    if not pages:
        return _NO_INTS
    numbers = np.array([len(pages), *(host_page for host_page, _ in pages)], np.int32)
    keys = b"".join(unit for _, key in pages for unit in key)
    return np.concatenate([numbers, np.frombuffer(keys, np.int32)])


def unpack_pages(words: Ints) -> list[tuple[int, PageKey]]:
    """Undo `pack_pages`."""
    if not len(words):
        return []
    count = int(words[0])
    names = words[1 + count :].reshape(count, -1, _HASH_WORDS)
    keys = (tuple(unit.tobytes() for unit in name) for name in names)
    return list(zip(words[1 : 1 + count].tolist(), keys, strict=True))


def pack_plans(plans: list[StepPlan]) -> Ints:
    """Return a step as words: the number of groups, the lengths of their plans, the plans."""
    sections = [plan.pack() for plan in plans]
    head = np.array([len(plans), *map(len, sections)], np.int32)
    return np.concatenate([head, *sections])


def unpack_plans(words: Ints) -> list[StepPlan]:
    """Undo `pack_plans`."""
    count = int(words[0])
    stops = (1 + count + words[1 : 1 + count].cumsum()).tolist()
    starts = [1 + count, *stops]
    return [StepPlan.unpack(words[a:b]) for a, b in zip(starts, stops, strict=False)]


class PlanChannel:
    """Sends rank 0's plans to all ranks, one for each group; None makes them return from `follow`.

    The first word of a message is the length of the plans, `_PAUSE`, or a number below it that is
    shared. A rank that gets another kind of message than it waits for is in another call.
    """

    def __init__(self, control: Collectives, watchdog: Watchdog | None = None) -> None:
        self._control = control
        self.watchdog = watchdog or Watchdog()

    def _broadcast(self, words: Ints) -> Ints:
        with self.watchdog.exchange():
            return self._control.broadcast(torch.from_numpy(words)).numpy()

    def share(self, number: int) -> int:
        """Return rank 0's number on all ranks. A collective."""
        if self._control.size == 1:
            return number
        first = np.zeros(_FIRST_WORDS, np.int32)
        first[0] = _PAUSE - 1 - number
        first = self._broadcast(first)
        if first[0] >= _PAUSE:
            self._fail()
        return _PAUSE - 1 - int(first[0])

    def _fail(self) -> NoReturn:
        """End the job: the script has made other calls here than on rank 0."""
        name, other = (self.watchdog.name_of(rank) for rank in (self._control.rank, 0))
        reason = f"{name} makes another call than {other}: all ranks must make the same calls"
        self.watchdog.fail(RankError(reason))

    def send(self, plans: list[StepPlan] | None) -> None:
        """Send from rank 0."""
        if self._control.size == 1:
            return
        words = np.zeros(0, np.int32) if plans is None else pack_plans(plans)
        first = np.zeros(_FIRST_WORDS, np.int32)
        first[0] = _PAUSE if plans is None else len(words)
        head = words[: _FIRST_WORDS - 1]
        first[1 : 1 + len(head)] = head
        self._broadcast(first)
        if len(words) > len(head):
            self._broadcast(np.ascontiguousarray(words[len(head) :]))

    def receive(self) -> list[StepPlan] | None:
        """Receive on the other ranks."""
        first = self._broadcast(np.zeros(_FIRST_WORDS, np.int32))
        length = int(first[0])
        if length < _PAUSE:
            self._fail()
        if length == _PAUSE:
            return None
        words = first[1 : 1 + length]
        if length > len(words):
            rest = self._broadcast(np.zeros(length - len(words), np.int32))
            words = np.concatenate([words, rest])
        return unpack_plans(words)
