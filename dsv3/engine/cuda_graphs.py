"""Short steps on buffers that never move, so that one CUDA graph holds a whole step.

Each new token is a row, with a page table of its own: the tokens of a short prompt are rows beside
those of the sequences that decode, and see the entries that the step writes before it attends. So
a step that also prefills reads every weight once, and costs the host one launch. The step is padded
to a bucket of rows and pages. All data-parallel groups choose the same bucket without an exchange,
because every rank has all plans. The inputs are written into one block of memory; everything from
the embedding to the sampled tokens runs on it. On CUDA it is a graph, captured when the bucket is
first used; elsewhere, in tests and benchmarks, the same function is called.
"""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.cache.pool import CachePool
from dsv3.distributed.collective_errors import collective_errors
from dsv3.engine.drafts import Drafter
from dsv3.engine.sampler import Sampler
from dsv3.engine.static_buffers import StaticBuffers
from dsv3.engine.step_plan import NO_TARGET, StepPlan, num_drafts_of
from dsv3.engine.step_result import StepResult
from dsv3.errors import RankError, describe_error
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.batch import Batch, DecodeGroup
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_dispatch import StepTokens
from dsv3_kernels import next_power_of_2, row_bucket

log = logging.getLogger(__name__)

MAX_ROWS = 256
# Most rows of all groups together. Every group's rows travel to all others, padding included;
# larger steps run without graphs and send rows only to ranks that need them. Not measured on a GPU.
MAX_GATHERED = 2048
# Every token of a prompt reads the keys before it anew. Up to this number of keys that costs less
# than a launch of every kernel: 150 MB a layer for V3, 50 us. Longer prompts keep the device busy
# for longer than the host launches them. An estimate, not measured on a GPU.
MAX_PROMPT_KEYS = 1 << 17
_FEWEST_PAGES = 16
_FEWEST_PROMPT_ROWS = 64


def prompt_bucket(count: int) -> int:
    """Return the padded number of rows of a step with prompts: a power of two.

    Their lengths vary, so there are few sizes. Padding is cheap beside reading the weights.
    """
    return max(_FEWEST_PROMPT_ROWS, next_power_of_2(count))


def most_rows(max_tokens: int, groups: int) -> int:
    """Return the most rows of a group in a step on static buffers, padding included.

    Args:
        max_tokens: most new tokens of a group in a step.
        groups: data-parallel groups.
    """
    counts = range(1, min(max_tokens, MAX_ROWS) + 1)
    sizes = {bucket(n) for n in counts for bucket in (row_bucket, prompt_bucket)}
    return max((size for size in sizes if size * groups <= MAX_GATHERED), default=1)


def page_bucket(count: int) -> int:
    """Return the padded number of pages of a row: a power of two."""
    return max(_FEWEST_PAGES, next_power_of_2(count))


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes and kind of a step; there is one graph for each.

    Attributes:
        rows, pages: sizes of the buffers.
        samples: tokens are sampled from whole rows of logits; otherwise the ranks' best logits are
            compared.
        num_drafts: drafts made for each sequence.
    """

    rows: int
    pages: int
    samples: bool
    num_drafts: int = 0

    def __str__(self) -> str:
        """Name the steps of the bucket in a log line."""
        kind = "sampled" if self.samples else "greedy"
        return f"{kind} steps of {self.rows} tokens and {self.pages} pages a sequence"


@dataclass(frozen=True, slots=True)
class TokenTables:
    """Where the new tokens of a plan are, and where their entries go.

    Attributes:
        position_T: positions in their sequences.
        slot_T: slots of the new entries; -1 for entries of other ranks.
        page_TG: pages of the tokens' sequences, as many as the longest needs.
    """

    position_T: NDArray[np.int64]
    slot_T: NDArray[np.int64]
    page_TG: NDArray[np.int32]


class GraphRunner:
    """Runs the short steps of one rank on static buffers.

    Args:
        model, cache, sampler: of the rank.
        rule: of the keys that tokens attend to.
        drafter: drafts tokens at the end of each step; None drafts none.
        max_feed: sampled rows that the next step can read its tokens from.

    Attributes:
        seconds: time spent on capturing.
    """

    def __init__(
        self,
        model: Transformer,
        cache: CachePool,
        sampler: Sampler,
        rule: AbsorbRule,
        drafter: Drafter | None = None,
        max_feed: int = 4096,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._rule = rule
        self._drafter = drafter
        self._num_groups = model.dispatch.mesh.layout.dp
        self._device = cache.device
        self._feed = torch.zeros(max_feed, dtype=torch.int64, device=self._device)
        self._inputs: dict[Bucket, StaticBuffers] = {}
        self._drafts: dict[Bucket, Tensor] = {}
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._failed: set[Bucket] = set()  # could not be captured
        self.seconds = 0.0

    def bucket(self, plans: list[StepPlan]) -> Bucket | None:
        """Return the bucket of a step; None if it must run eagerly.

        A step runs eagerly if it is too long, or if any group scores, reports log-probabilities, or
        has rows with penalties or biases.
        """
        count = max(len(plan.token_ids) for plan in plans)
        if not 0 < count <= MAX_ROWS or not all(self._is_plain(plan) for plan in plans):
            return None
        num_drafts = num_drafts_of(plans)
        is_decode = all(plan.query_len.max(initial=1) <= 1 + num_drafts for plan in plans)
        rows = row_bucket(count) if is_decode else prompt_bucket(count)
        if rows * len(plans) > MAX_GATHERED:
            return None
        if max(_num_prompt_keys(plan, 1 + num_drafts) for plan in plans) > MAX_PROMPT_KEYS:
            return None
        longest = max(int((p.context_len + p.query_len).max(initial=1)) for p in plans)
        samples = any((plan.temperature > 0).any() for plan in plans)
        pages = page_bucket(self._cache.layout.pages_for(longest + num_drafts))
        bucket = Bucket(rows, pages, samples, num_drafts)
        return None if bucket in self._failed else bucket

    def _is_plain(self, plan: StepPlan) -> bool:
        """Return True if a group only samples or checks the last token of each sequence."""
        return (
            len(plan.row) == len(plan.query_len) + plan.draft_checked.sum()
            and not len(plan.adjust)
            and bool((plan.target == NO_TARGET).all() and (plan.top_logprobs < 0).all())
            and -int(plan.token_ids.min(initial=0)) <= len(self._feed)
        )

    def feed(self, token_M: Tensor) -> None:
        """Take over the sampled tokens of a step that ran eagerly."""
        count = min(len(token_M), len(self._feed))
        self._feed[:count] = token_M[:count]

    def run(self, bucket: Bucket, plan: StepPlan, tables: TokenTables) -> StepResult:
        """Run a step. A collective.

        Args:
            bucket: the step's, from `bucket`.
            plan: of this rank's group, possibly empty.
            tables: of the plan's tokens.
        """
        inputs = self._inputs.get(bucket)
        if inputs is None:
            inputs = self._inputs[bucket] = StaticBuffers(bucket.rows, bucket.pages, self._device)
            shape = bucket.rows, bucket.num_drafts
            self._drafts[bucket] = torch.zeros(shape, dtype=torch.int64, device=self._device)
        inputs.fill(
            tables.page_TG,
            token=plan.token_ids,
            position=tables.position_T,
            slot=tables.slot_T,
            next=plan.next_ids,
            row=plan.row,
            predicted=plan.position,
            seed=plan.seed,
            answer=plan.answer,
            top_k=plan.top_k,
            temperature=plan.temperature,
            top_p=plan.top_p,
            min_p=plan.min_p,
            draft_row=plan.draft_row,
            draft_result=plan.draft_result,
            draft_checked=plan.draft_checked,
        )
        graph = self._graphs.get(bucket)
        if graph is not None:
            graph.replay()
        else:
            # Also compiles the kernels that a capture needs, and opens connections.
            self._compute(bucket, inputs)
            if self._pool is not None:
                self._capture_on_all_ranks(bucket, inputs)
        # The next step overwrites the buffer.
        draft_NK = None
        if bucket.num_drafts:
            draft_NK = self._drafts[bucket][: len(plan.draft_row)].clone()
        return StepResult(self._feed[: len(plan.row)].clone(), draft_NK=draft_NK)

    def _compute(self, bucket: Bucket, inputs: StaticBuffers) -> None:
        """Run the step on the buffers; the host never waits for the device here."""
        batch = self._batch(bucket, inputs)
        hidden_TD = self._model(batch, self._cache)
        logits_MW = self._model.logits(hidden_TD[inputs.row("row")])
        choice = inputs.choice() if bucket.samples else None
        if choice is None:
            token_M = self._sampler.greedy(logits_MW)
        else:
            token_M = self._sampler.whole_rows(logits_MW, choice, 1)[:, 0].long()
        self._feed[: bucket.rows] = token_M
        if self._drafter is not None and bucket.num_drafts:
            rows = inputs.draft_rows(choice)
            per_group = [bucket.rows] * self._num_groups
            drafts = self._drafter(hidden_TD, token_M, batch, rows, bucket.num_drafts, per_group)
            self._drafts[bucket].copy_(drafts)

    def _batch(self, bucket: Bucket, inputs: StaticBuffers) -> Batch:
        """Return the batch of the buffers' tokens; each is a sequence of one query."""
        token_T = inputs.row("token")
        position_T = inputs.row("position")
        per_group = [bucket.rows] * self._num_groups
        capacity = bucket.pages * self._cache.layout.page_size
        group = DecodeGroup(
            start=0,
            stop=bucket.rows,
            page_BG=inputs.page_TG,
            query_pos_BQ=position_T[:, None],
            is_sparse=self._rule.selects(capacity),
        )
        fed_T = self._feed[(-1 - token_T).clamp_min(0)].clamp_min(0)  # a row may have failed
        return Batch(
            token_T=torch.where(token_T < 0, fed_T, token_T),
            position_T=position_T,
            own_slot=inputs.row("slot"),
            num_decode_rows=bucket.rows,
            tokens=StepTokens(per_group, is_static=True, position_T=position_T),
            groups=[group],
        )

    def _capture_on_all_ranks(self, bucket: Bucket, inputs: StaticBuffers) -> None:
        """Capture the bucket's graph; if any rank fails, no rank has one. A collective.

        A capture executes nothing, so no rank waits in an exchange that another one has not begun.
        """
        mesh = self._model.dispatch.mesh
        try:
            with collective_errors(mesh, "capturing", is_fatal=False):
                self._graphs[bucket] = self._capture(bucket, inputs)
        except (RuntimeError, RankError) as error:
            self._graphs.pop(bucket, None)
            self._inputs.pop(bucket, None)
            self._drafts.pop(bucket, None)
            self._failed.add(bucket)
            if mesh.layout.rank == 0:
                text = "%s run eagerly: their CUDA graph cannot be captured: %s"
                log.warning(text, bucket, describe_error(error))
            log.debug("the capture that failed:", exc_info=error)

    def _capture(self, bucket: Bucket, inputs: StaticBuffers) -> torch.cuda.CUDAGraph:
        begin = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream()
        # Other threads (NCCL's) may use the device during the capture.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            with capture:
                self._compute(bucket, inputs)
        except BaseException:
            # If the end of a capture raises, torch goes on with its stream and its memory.
            torch.cuda.set_stream(main)
            assert self._pool is not None
            with suppress(RuntimeError):  # this torch has ended it
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            raise
        self.seconds += time.perf_counter() - begin
        return graph


def _num_prompt_keys(plan: StepPlan, most: int) -> int:
    """Return the keys that the tokens of sequences with over `most` new ones attend to, at most."""
    num_keys_B = plan.query_len.astype(np.int64) * (plan.context_len + plan.query_len)
    return int(num_keys_B[plan.query_len > most].sum())
