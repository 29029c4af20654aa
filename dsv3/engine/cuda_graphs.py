"""Decode steps on buffers that never move, so that one CUDA graph holds a whole step.

A step with one new token per sequence is padded to a bucket of sequences and pages. All
data-parallel groups choose the same bucket without an exchange, because every rank has all plans.
The inputs are written into one block of memory; everything from the embedding to the sampled tokens
runs on it. On CUDA it is a graph, captured when the bucket is first used; elsewhere, in tests and
benchmarks, the same function is called.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.cache.layout import NULL_PAGE
from dsv3.cache.pool import CachePool
from dsv3.distributed.collective_errors import collective_errors
from dsv3.engine.sampler import Choice, Sampler
from dsv3.engine.step_plan import NO_TARGET, StepPlan
from dsv3.engine.step_result import StepResult
from dsv3.errors import RankError
from dsv3.model.batch import Batch, DecodeGroup
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_dispatch import StepTokens
from dsv3_kernels import row_bucket

log = logging.getLogger(__name__)

MAX_ROWS = 256
# Most rows of all groups together. Every group's rows travel to all others, padding included;
# larger steps run without graphs and send rows only to ranks that need them. Not measured on a GPU.
MAX_GATHERED = 2048
_FEWEST_PAGES = 16
# Arrays of a step, one value a row.
_FLOATS = ("temperature", "top_p", "min_p")
_ARRAYS = ("token", "position", "slot", "seed", "answer", "top_k", *_FLOATS)


def most_rows(max_running: int, groups: int) -> int:
    """Return the largest number of sequences of a group in a step on static buffers."""
    counts = range(1, min(max_running, MAX_ROWS) + 1)
    return max((n for n in counts if row_bucket(n) * groups <= MAX_GATHERED), default=1)


def page_bucket(count: int) -> int:
    """Return the padded number of pages of a row: a power of two."""
    return max(_FEWEST_PAGES, 1 << (count - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes and kind of a step; there is one graph for each.

    Attributes:
        rows, pages: sizes of the buffers.
        samples: tokens are sampled from whole rows of logits; otherwise the ranks' best logits are
            compared.
    """

    rows: int
    pages: int
    samples: bool


class StaticBuffers:
    """Input buffers of one bucket: arrays of rows (int64, or float64 as its bits) and page tables.

    The host has two copies of each: it writes one while the other may still be in transfer.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        shapes = (len(_ARRAYS), bucket.rows), (bucket.rows, bucket.pages)
        kinds = tuple(zip(shapes, (torch.int64, torch.int32), strict=True))
        on_gpu = device.type == "cuda"
        self._hosts = [
            [torch.zeros(shape, dtype=dtype, pin_memory=on_gpu) for shape, dtype in kinds]
            for _ in range(2)
        ]
        self._sent = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._device = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        self._turn = 0

    @property
    def page_BG(self) -> Tensor:
        """Page tables, [rows, pages] int32."""
        return self._device[1]

    def row(self, name: str) -> Tensor:
        """Return an array, [rows] int64 or float32."""
        values = self._device[0][_ARRAYS.index(name)]
        return values.view(torch.float64).float() if name in _FLOATS else values

    def fill(self, table_BG: NDArray[np.int32], arrays: tuple[NDArray[Any], ...]) -> None:
        """Write a step's page tables and arrays, and send them; does not wait for the device.

        Padding rows see no key, choose no expert and write nothing.
        """
        self._turn ^= 1
        if self._sent:
            self._sent[self._turn].synchronize()
        rows, table = (host.numpy() for host in self._hosts[self._turn])
        count, width = table_BG.shape
        table[:count, :width], table[:count, width:], table[count:] = table_BG, NULL_PAGE, NULL_PAGE
        for name, row, values in zip(_ARRAYS, rows, arrays, strict=True):
            target = row.view(np.float64) if name in _FLOATS else row
            target[:count], target[count:] = values, -1 if name in ("position", "slot") else 0
        for device, host in zip(self._device, self._hosts[self._turn], strict=True):
            device.copy_(host, non_blocking=True)
        if self._sent:
            self._sent[self._turn].record()


class GraphRunner:
    """Runs the decode steps of one rank on static buffers.

    Args:
        model, cache, sampler: of the rank.
        max_feed: sampled rows that the next step can read its tokens from.

    Attributes:
        seconds: time spent on capturing.
    """

    def __init__(
        self, model: Transformer, cache: CachePool, sampler: Sampler, max_feed: int = 4096
    ) -> None:
        self._model, self._cache, self._sampler = model, cache, sampler
        self._device = cache.device
        self._feed = torch.zeros(max_feed, dtype=torch.int64, device=self._device)
        self._inputs: dict[Bucket, StaticBuffers] = {}
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        # Kinds of steps, by `Bucket.samples`, that could not be captured.
        self._failed: set[bool] = set()
        self.seconds = 0.0

    def bucket(self, plans: list[StepPlan]) -> Bucket | None:
        """Return the bucket of a step; None if it must run eagerly.

        A step runs eagerly if any group prefills, scores or reports log-probabilities, or has rows
        with penalties or biases.
        """
        count = longest = 0
        samples = False
        for plan in plans:
            if not len(plan.token_ids) == len(plan.row) == len(plan.query_len):
                return None
            if len(plan.adjust):
                return None
            if (plan.target != NO_TARGET).any() or (plan.top_logprobs >= 0).any():
                return None
            if -int(plan.token_ids.min(initial=0)) > len(self._feed):
                return None
            count = max(count, len(plan.row))
            longest = max(longest, int(plan.context_len.max(initial=0)))
            samples |= bool((plan.temperature > 0).any())
        rows = row_bucket(count)
        if not 0 < count <= MAX_ROWS or rows * len(plans) > MAX_GATHERED or samples in self._failed:
            return None
        return Bucket(rows, page_bucket(self._cache.layout.pages_for(longest + 1)), samples)

    def feed(self, token_M: Tensor) -> None:
        """Take over the sampled tokens of a step that ran eagerly."""
        count = min(len(token_M), len(self._feed))
        self._feed[:count] = token_M[:count]

    def run(
        self,
        bucket: Bucket,
        plan: StepPlan,
        table_BG: NDArray[np.int32],
        slot_B: NDArray[np.int64],
    ) -> StepResult | None:
        """Run a step. A collective.

        Args:
            bucket: the step's, from `bucket`.
            plan: of this rank's group, possibly empty.
            table_BG: [B, G] pages of the sequences, as many as the longest needs.
            slot_B: [B] slots of the new entries; -1 for entries of other ranks.

        Returns:
            the tokens; None if the step cannot be captured and did not run.
        """
        inputs = self._inputs.get(bucket)
        if inputs is None:
            inputs = self._inputs[bucket] = StaticBuffers(bucket, self._device)
        seed = plan.seed_high.astype(np.int64) << 32 | plan.seed_low.view(np.uint32)
        longs = (plan.token_ids, plan.context_len, slot_B, seed, plan.answer, plan.top_k)
        inputs.fill(table_BG, (*longs, plan.temperature, plan.top_p, plan.min_p))
        if self._pool is None:
            self._compute(bucket, inputs)
        elif not self._replay(bucket, inputs):
            return None
        # The next step overwrites the buffer.
        return StepResult(self._feed[: len(plan.row)].clone(), None)

    def _compute(self, bucket: Bucket, inputs: StaticBuffers) -> None:
        """Run the step on the buffers; the host never waits for the device here."""
        token_T, position_T = inputs.row("token"), inputs.row("position")
        num_groups = self._model.dispatch.mesh.layout.dp
        tokens = StepTokens([bucket.rows] * num_groups, is_static=True, position_T=position_T)
        fed_T = self._feed[(-1 - token_T).clamp_min(0)].clamp_min(0)  # a row may have failed
        batch = Batch(
            token_T=torch.where(token_T < 0, fed_T, token_T),
            position_T=position_T,
            own_slot=inputs.row("slot"),
            num_decode_rows=bucket.rows,
            tokens=tokens,
            groups=[DecodeGroup(0, bucket.rows, inputs.page_BG, position_T[:, None])],
        )
        logits_MW = self._model.logits(self._model(batch, self._cache))
        if bucket.samples:
            names = ("temperature", "top_k", "top_p", "min_p", "seed", "answer")
            arrays = [inputs.row(name) for name in names]
            arrays += [position_T + 1, torch.full_like(position_T, NO_TARGET)]
            choice = Choice(*arrays)
            token_M = self._sampler.whole_rows(logits_MW, choice, 1)[:, 0].long()
        else:
            token_M = self._sampler.greedy(logits_MW)
        self._feed[: bucket.rows] = token_M

    def _replay(self, bucket: Bucket, inputs: StaticBuffers) -> bool:
        """Replay the bucket's graph, captured at its first use; False if it cannot be."""
        if bucket not in self._graphs:
            try:
                with collective_errors(self._model.dispatch.mesh, "capturing", is_fatal=False):
                    self._graphs[bucket] = self._capture(bucket, inputs)
            except (RuntimeError, RankError) as error:
                self._failed.add(bucket.samples)
                log.warning("steps run without CUDA graphs: %s", str(error).split("\n")[0])
                return False
        self._graphs[bucket].replay()
        return True

    def _capture(self, bucket: Bucket, inputs: StaticBuffers) -> torch.cuda.CUDAGraph:
        begin = time.perf_counter()
        fed = self._feed.clone()
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        # A first run compiles kernels and opens connections; it writes what a replay writes.
        with torch.cuda.stream(side):
            self._compute(bucket, inputs)
        main.wait_stream(side)
        self._feed.copy_(fed)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's) may use the device during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(bucket, inputs)
        self.seconds += time.perf_counter() - begin
        return graph
