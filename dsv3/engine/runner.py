"""Executes step plans on one rank: plan -> device batch -> model -> sampled tokens."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsv3.cache.layout import NULL_PAGE, CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.engine.balance import Balancer
from dsv3.engine.cuda_graphs import GraphRunner, TokenTables
from dsv3.engine.divergence import DivergenceCheck
from dsv3.engine.drafts import Drafter, DraftRows
from dsv3.engine.layer_check import LayerCheck
from dsv3.engine.page_mover import PageMover
from dsv3.engine.sampler import Sampler
from dsv3.engine.step_plan import StepPlan, num_drafts_of
from dsv3.engine.step_result import StepResult
from dsv3.engine.transfer import all_to_device, to_device
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.batch import Batch, Chunk, DecodeGroup
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_dispatch import StepTokens
from dsv3_kernels import StoredRows

Longs = NDArray[np.int64]


class Runner:
    """One rank's model and cache. Every rank runs its group's part of the same step.

    Args:
        model: this rank's shard, loaded.
        cache: this rank's cache.
        rule: of the sequences that attend straight to the cache; the others in expanded form.
        mover: moves pages between the cache's tiers; None without lower tiers.
        static: run short steps on static buffers; on CUDA as graphs.
        check: compares digests over ranks; None compares nothing.
        layer_check: finds layers whose output is not finite, in eager steps; None looks for none.
        drafts: the model has its MTP layer, which drafts tokens where plans ask for it.

    Attributes:
        model, cache, rule, device: as given.
        sampler: chooses tokens from the model's output.
        balancer: moves experts; None leaves them where they are.
    """

    def __init__(
        self,
        model: Transformer,
        cache: CachePool,
        rule: AbsorbRule,
        mover: PageMover | None = None,
        static: bool = False,
        check: DivergenceCheck | None = None,
        layer_check: LayerCheck | None = None,
        drafts: bool = False,
    ) -> None:
        self.model = model
        self.cache = cache
        self.rule = rule
        self._mesh = model.dispatch.mesh
        self._mover = mover
        self._check = check
        self.balancer: Balancer | None = None
        self._layer_check = layer_check
        self.device = cache.device
        sampler = Sampler(model, cache.tp, self.device)
        self.sampler: Callable[[Tensor, StepPlan, int, Tensor], StepResult] = sampler
        self._drafter = Drafter(model, cache, sampler, rule) if drafts else None
        self._static = None
        if static:
            self._static = GraphRunner(model, cache, sampler, rule, self._drafter)
        self._around: Callable[[StepPlan], AbstractContextManager[object]] = nullcontext
        self._last_token_M = torch.zeros(0, dtype=torch.int64, device=self.device)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sent to others so far, but for replays of CUDA graphs."""
        return self._mesh.sent_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights this rank holds."""
        return self.model.num_bytes

    @property
    def host_cache_bytes(self) -> int:
        """Bytes of host memory this rank keeps pages in."""
        return 0 if self._mover is None else self._mover.host.num_bytes

    @property
    def numerics(self) -> str:
        """Arithmetic of the model: float32, bfloat16 or fp8."""
        return self.model.numerics

    @property
    def capture_seconds(self) -> float:
        """Seconds spent on capturing CUDA graphs so far."""
        return 0.0 if self._static is None else self._static.seconds

    def run_eagerly(self, around: Callable[[StepPlan], AbstractContextManager[object]]) -> None:
        """Run every step from now on inside `around(plan)`, without static buffers or graphs."""
        self._static = None
        self._around = around

    def run(self, plans: list[StepPlan]) -> StepResult:
        """Run the plan of this rank's group; all groups run their plans together. A collective.

        Returns:
            the results of all groups, one after the other; the same on every rank.
        """
        with self._around(plans[self._mesh.layout.dp_rank]):
            try:
                return self._run(plans)
            except BaseException:
                with suppress(RuntimeError):  # the device has failed
                    self.model.clear_locks()
                raise

    @torch.inference_mode()
    def _run(self, plans: list[StepPlan]) -> StepResult:
        plan = plans[self._mesh.layout.dp_rank]
        fetched = self._move_pages(plan)
        if not any(len(each.token_ids) for each in plans):
            return StepResult(self._last_token_M[:0], fetched=fetched)
        if self.balancer is not None:
            self.balancer.before_step()
        sampled = self._sample(plans, plan)
        self._last_token_M = sampled.token_M
        every = self._gather(sampled, plans)
        if self._check is not None:
            self._check.add(plans, every.token_M)
        return replace(every, fetched=fetched)

    def _sample(self, plans: list[StepPlan], plan: StepPlan) -> StepResult:
        """Run the model on `plan`, that of this rank's group, and choose tokens."""
        builder = BatchBuilder(plan, self.cache.layout, self.device, self.rule)
        if self._static is not None and (bucket := self._static.bucket(plans)) is not None:
            return self._static.run(bucket, plan, builder.token_tables())
        batch = builder.build()
        batch.tokens = StepTokens([len(each.token_ids) for each in plans])
        if plan.token_ids.min(initial=0) < 0:
            batch.token_T = self._fed(batch.token_T)
        width = max(int(each.top_logprobs.max(initial=-1)) for each in plans)
        step = partial(self.model, batch, self.cache)
        hidden_TD = step() if self._layer_check is None else self._layer_check.run(step)
        sampled = self.sampler(hidden_TD, plan, width, self._last_token_M)
        if self._layer_check is not None:
            sampled = replace(sampled, bad_layer=self._layer_check.bad_layer)
        num_drafts = num_drafts_of(plans)
        if self._drafter is not None and num_drafts:
            draft_NK = self._drafter(
                hidden_TD,
                sampled.token_M,
                batch,
                builder.draft_rows(),
                num_drafts,
                [len(each.draft_row) for each in plans],
            )
            sampled = replace(sampled, draft_NK=draft_NK)
        if self._static is not None:
            self._static.feed(sampled.token_M)
        return sampled

    def _fed(self, token_T: Tensor) -> Tensor:
        """Return tokens in which -1 - m is replaced by the result of row m of the last step."""
        fed_T = self._last_token_M[(-1 - token_T).clamp_min(0)]
        fed_T = fed_T.clamp_min(0)  # NOT_FINITE; the result of such a sequence is ignored
        return torch.where(token_T < 0, fed_T, token_T)

    def _gather(self, mine: StepResult, plans: list[StepPlan]) -> StepResult:
        """Return the results of all groups, one after the other; each rank has its own group's."""
        if len(plans) == 1:
            return mine
        packed = mine.token_M[:, None]
        if mine.scores is not None:
            packed = torch.cat((packed.double(), mine.scores), 1)  # ids are exact in float64
        rows = self._gather_rows(packed, [len(each.row) for each in plans])
        scores = None if mine.scores is None else rows[:, 1:]
        draft_NK = mine.draft_NK
        if draft_NK is not None:
            draft_NK = self._gather_rows(draft_NK, [len(each.draft_row) for each in plans])
        return replace(mine, token_M=rows[:, 0].long(), scores=scores, draft_NK=draft_NK)

    def _gather_rows(self, mine: Tensor, num_rows: list[int]) -> Tensor:
        """Return the rows of all groups, one after the other."""
        longest = max(num_rows)
        if not longest or not mine.shape[1]:
            return mine
        every = self._mesh.dp.all_gather(F.pad(mine, (0, 0, 0, longest - len(mine))))
        return torch.cat([part[:count] for part, count in zip(every, num_rows, strict=True)])

    def finish(self) -> None:
        """Write the experts' loads at the end of a run, if they are recorded. A collective."""
        if self.balancer is not None:
            self.balancer.finish()

    def _move_pages(self, plan: StepPlan) -> dict[int, bool]:
        """Execute the plan's copies and transfers of pages; return `StepResult.fetched`."""
        fetched = {} if self._mover is None else self._mover.before_copies(plan)
        if len(plan.copies):
            pages = to_device(plan.copies.astype(np.int64), self.device)
            self.cache.copy_pages(*pages.view(2, -1))
        if self._mover is not None:
            self._mover.after_copies(plan)
        return fetched


class BatchBuilder:
    """Turns a plan into a rank's batch; plain numpy on the host, then one copy."""

    def __init__(
        self, plan: StepPlan, layout: CacheLayout, device: torch.device, rule: AbsorbRule
    ) -> None:
        self._plan = plan
        self._layout = layout
        self._device = device
        self._rule = rule
        # As lists too: of the few values of a short step, numpy's calls take longer than Python's.
        self._query_lens = plan.query_len.tolist()
        self._context_lens = plan.context_len.tolist()
        self._row_starts = list(accumulate(self._query_lens, initial=0))
        self._row_start = np.array(self._row_starts)
        self._page_start = np.array(list(accumulate(plan.page_count.tolist(), initial=0)))

    def build(self) -> Batch:
        """Return the batch."""
        plan = self._plan
        num_seqs = len(self._query_lens)
        row_seq, position = self._positions()
        # The scheduler puts the sequences in front that attend straight to the cache.
        lengths = zip(self._query_lens, self._context_lens, strict=True)
        absorbs = [self._rule.absorbs(*each) for each in lengths]
        num_absorbed = sum(absorbs)
        assert all(absorbs[:num_absorbed]), f"{plan.query_len=} {plan.context_len=}"
        num_decode_rows = self._row_starts[num_absorbed]
        bounds = self._group_bounds(num_absorbed)
        long_seqs = range(num_absorbed, num_seqs)
        slots = self._own_slots(row_seq, position)
        arrays: list[NDArray[Any]] = [plan.token_ids.astype(np.int64), position, slots]
        arrays.append((self._row_start[num_absorbed:] - num_decode_rows).astype(np.int32))
        for first, last in bounds:
            arrays += self._group_arrays(first, last)
        arrays += [self._context_pages(seq) for seq in long_seqs]
        token_T, position_T, own_slot, start_L, *rest = all_to_device(arrays, self._device)
        sent = iter(rest)
        return Batch(
            token_T=token_T,
            position_T=position_T,
            own_slot=own_slot,
            num_decode_rows=num_decode_rows,
            groups=[self._group(*each, next(sent), next(sent)) for each in bounds],
            chunks=[self._chunk(seq, next(sent)) for seq in long_seqs],
            chunk_start_L=start_L if long_seqs else None,
            stored=self._stored_rows(own_slot) if self._device.type == "cpu" else None,
        )

    def draft_rows(self) -> DraftRows:
        """Return the rows that drafts continue."""
        plan = self._plan
        seq_N = np.searchsorted(self._row_start, plan.draft_row, side="right") - 1
        width = int(plan.page_count[seq_N].max(initial=1))
        pages = self._page_table(0, len(plan.query_len), width)[seq_N]
        return DraftRows.of(plan, pages, self._device)

    def token_tables(self) -> TokenTables:
        """Return positions, slots and pages of every new token."""
        row_seq, position = self._positions()
        width = self._layout.pages_for(int(position.max(initial=-1)) + 1)
        pages = self._page_table(0, len(self._plan.query_len), width)[row_seq]
        return TokenTables(position, self._own_slots(row_seq, position), pages)

    def _positions(self) -> tuple[Longs, Longs]:
        """Return the sequence of every new token, and its position there."""
        plan = self._plan
        row_seq = np.repeat(np.arange(len(plan.query_len)), plan.query_len)
        in_seq = np.arange(len(row_seq)) - self._row_start[row_seq]
        return row_seq, (plan.context_len[row_seq] + in_seq).astype(np.int64)

    def _own_slots(self, row_seq: Longs, position: Longs) -> Longs:
        """Return the slots of the new entries; -1 for entries of other ranks."""
        paging = self._layout.paging
        page = self._plan.pages[self._page_start[row_seq] + position // paging.page_size]
        slot = page * paging.slots_per_page + position % paging.page_size // paging.shards
        return np.where(position % paging.shards == paging.shard, slot, -1).astype(np.int64)

    def _stored_rows(self, own_slot: Tensor) -> StoredRows:
        """Return the rows with a slot: all of them where one rank stores all positions."""
        if self._layout.paging.shards == 1:
            return StoredRows(None, own_slot)
        return StoredRows.of(own_slot)

    def _group_bounds(self, num_absorbed: int) -> list[tuple[int, int]]:
        """Split the sequences that attend to the cache where their new tokens differ.

        On a CPU also where padding them to one length would waste too much; kernels skip padding.
        """
        query_lens = self._query_lens
        context_lens = self._context_lens
        bounds = []
        start = 0
        on_cpu = self._device.type == "cpu"
        for seq in range(1, num_absorbed + 1):
            if seq < num_absorbed and query_lens[seq] == query_lens[start]:
                wasteful = 2 * context_lens[start] + self._layout.page_size
                if not on_cpu or context_lens[seq] <= wasteful:
                    continue
            bounds.append((start, seq))
            start = seq
        return bounds

    def _longest(self, first: int, last: int) -> int:
        """Return the positions of the longest of some sequences with as many new tokens."""
        return max(self._context_lens[first:last]) + self._query_lens[first]

    def _group_arrays(self, first: int, last: int) -> tuple[NDArray[np.int32], Longs]:
        """Return `page_BG` and `query_pos_BQ` of a decode group."""
        width = self._layout.pages_for(self._longest(first, last))
        context = self._plan.context_len[first:last].astype(np.int64)
        query_pos_BQ = context[:, None] + np.arange(self._query_lens[first])
        return self._page_table(first, last, width), query_pos_BQ

    def _group(self, first: int, last: int, page_BG: Tensor, query_pos_BQ: Tensor) -> DecodeGroup:
        keys = None
        longest = self._longest(first, last)
        is_sparse = self._rule.selects(longest)
        if self._device.type == "cpu" and not is_sparse:
            paging = self._layout.paging
            shortest = min(self._context_lens[first:last])
            has_blind = shortest < paging.shard
            has_masked = has_blind or shortest + 1 < longest
            keys = paging.keys(page_BG, query_pos_BQ, longest, has_blind, has_masked)
        return DecodeGroup(
            start=self._row_starts[first],
            stop=self._row_starts[last],
            page_BG=page_BG,
            query_pos_BQ=query_pos_BQ,
            is_sparse=is_sparse,
            keys=keys,
        )

    def _context_pages(self, seq: int) -> Longs:
        """Return the pages of a sequence's context."""
        start = int(self._page_start[seq])
        stop = start + self._layout.pages_for(self._context_lens[seq])
        return self._plan.pages[start:stop].astype(np.int64)

    def _chunk(self, seq: int, page_G: Tensor) -> Chunk:
        return Chunk(
            self._row_starts[seq], self._row_starts[seq + 1], self._context_lens[seq], page_G
        )

    def _page_table(self, first: int, last: int, width: int) -> NDArray[np.int32]:
        """Return the first `width` pages of some sequences, rows filled up with the null page."""
        column = np.arange(width)
        at = np.minimum(self._page_start[first:last, None] + column, len(self._plan.pages) - 1)
        is_held = column < self._plan.page_count[first:last, None]
        return np.where(is_held, self._plan.pages[at], NULL_PAGE).astype(np.int32)
