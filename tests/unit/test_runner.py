"""From a plan to a rank's batch: every position is stored once and read where it was stored."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dsv3.cache.layout import NULL_PAGE, CacheLayout, Plane
from dsv3.cache.pool import CachePool
from dsv3.config import ParallelConfig
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine.runner import BatchBuilder, Runner
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.batch import Batch
from dsv3.model.moe import Router
from dsv3.model.transformer import Transformer
from dsv3.parallel.linear import Linear, VocabParallelHead
from dsv3.parallel.weight_format import WeightFormat
from dsv3_kernels import Paging
from tests.checkpoint_files import TINY

CPU = torch.device("cpu")
PAGE = 12
# (context, new tokens) of each sequence; single tokens first, as the scheduler orders them.
STEPS = [
    [(0, 1)],
    [(0, 1), (1, 1), (2, 1), (11, 1), (12, 1), (100, 1)],
    [(3, 1), (90, 1), (0, 2), (30, 2), (7, 5), (0, 30), (25, 40)],
    [(24, 12), (0, 13)],
]


def plan_of(step: list[tuple[int, int]]) -> StepPlan:
    """Sequences on scattered pages, with a page or two more than they need."""
    rng = np.random.default_rng(0)
    counts = [-(-(c + n) // PAGE) + i % 3 for i, (c, n) in enumerate(step)]
    new = sum(n for _, n in step)
    return StepPlan(
        token_ids=rng.integers(0, 1000, new).astype(np.int32),
        query_len=np.array([n for _, n in step], np.int32),
        context_len=np.array([c for c, _ in step], np.int32),
        page_count=np.array(counts, np.int32),
        pages=(rng.permutation(sum(counts)) + 1).astype(np.int32),
    )


def stored(plan: StepPlan, layout: CacheLayout) -> dict[int, tuple[int, int]]:
    """Slot -> (sequence, position) of all that this rank holds after the step, by definition."""
    slots = {}
    tables = np.split(plan.pages, plan.page_count.cumsum()[:-1])
    for seq, table in enumerate(tables):
        for p in range(int(plan.context_len[seq] + plan.query_len[seq])):
            if p % layout.paging.shards == layout.paging.shard:
                in_page = p % PAGE // layout.paging.shards
                slot = int(table[p // PAGE]) * layout.paging.slots_per_page + in_page
                assert slot not in slots
                slots[slot] = seq, p
    return slots


def build(plan: StepPlan, shards: int, shard: int, limit: int = 1) -> tuple[Batch, CacheLayout]:
    layout = CacheLayout((Plane("latent", 1, 1, (0,), "fp32"),), Paging(PAGE, shards, shard))
    return BatchBuilder(plan, layout, CPU, AbsorbRule(limit)).build(), layout


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_writes(step: list[tuple[int, int]], shards: int) -> None:
    plan = plan_of(step)
    rows = [(seq, c + i) for seq, (c, n) in enumerate(step) for i in range(n)]
    written: list[tuple[int, int]] = []
    for shard in range(shards):
        batch, layout = build(plan, shards, shard)
        assert batch.token_T.tolist() == plan.token_ids.tolist()
        assert batch.position_T.tolist() == [p for _, p in rows]
        assert len(batch.own_slot) == len(rows)
        slots = stored(plan, layout)
        own = {rows[t]: s for t, s in enumerate(batch.own_slot.tolist()) if s >= 0}
        assert all(slots[s] == row for row, s in own.items())
        assert batch.stored is not None
        row_N = batch.stored.row_N
        stored_rows = range(len(rows)) if row_N is None else row_N.tolist()
        assert own == {rows[t]: s for t, s in zip(stored_rows, batch.stored.slot_N, strict=True)}
        written += own
    assert sorted(written) == sorted(rows)


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_reads(step: list[tuple[int, int]], shards: int, limit: int) -> None:
    plan = plan_of(step)
    starts = np.concatenate([[0], plan.query_len.cumsum()]).tolist()
    for shard in range(shards):
        batch, layout = build(plan, shards, shard, limit)
        slots, seq = stored(plan, layout), 0
        for group in batch.groups:
            assert group.start == starts[seq]
            assert group.page_BG.dtype == torch.int32 and group.keys is not None
            key_pos = group.keys.key_pos_S
            is_later = key_pos > group.query_pos_BQ.unsqueeze(2)
            mask = group.keys.mask_BQS
            masked = torch.zeros_like(is_later) if mask is None else mask.isinf()
            assert torch.equal(masked, is_later)
            is_blind = is_later.all(2)
            known = group.keys.is_blind_BQ
            assert torch.equal(is_blind, torch.zeros_like(is_blind) if known is None else known)
            for table, slot, query_pos in zip(
                group.page_BG, group.keys.slot_BS, group.query_pos_BQ, strict=True
            ):
                context, new = step[seq]
                pages = plan.pages[plan.page_count[:seq].sum() :][: plan.page_count[seq]].tolist()
                padded = pages + [NULL_PAGE] * (len(table) - len(pages))
                assert len(table) * PAGE >= context + new
                assert table.tolist() == padded[: len(table)]
                assert query_pos.tolist() == list(range(context, context + new))
                seen = [
                    (slots[s], p)
                    for s, p in zip(slot.tolist(), key_pos.tolist(), strict=True)
                    if p < context + new
                ]
                wanted = [p for p in range(context + new) if p % shards == shard]
                assert seen == [((seq, p), p) for p in wanted]
                # Slot 0 is in the null page.
                assert bool((slot[key_pos >= context + new] == NULL_PAGE).all())
                seq += 1
            assert group.stop == starts[seq]
        assert batch.num_decode_rows == starts[seq]
        assert all(n <= limit for _, n in step[:seq]) and all(n > limit for _, n in step[seq:])
        if batch.chunks:
            assert batch.chunk_start_L is not None and batch.chunk_start_L.dtype == torch.int32
            bounds = [c.start for c in batch.chunks] + [batch.chunks[-1].stop]
            assert batch.chunk_start_L.tolist() == [b - batch.num_decode_rows for b in bounds]
        for chunk, (context, new) in zip(batch.chunks, step[seq:], strict=True):
            assert (chunk.start, chunk.stop) == (starts[seq], starts[seq + 1])
            assert chunk.context_len == context and chunk.stop - chunk.start == new
            pages = plan.pages[plan.page_count[:seq].sum() :][: -(-context // PAGE)]
            assert chunk.page_G.tolist() == pages.tolist()
            seq += 1


def test_short_sequences_are_not_padded_to_long_ones() -> None:
    contexts = [0, 5, 30, 40, 200, 210, 5000]
    plan = plan_of([(c, 1) for c in contexts])
    batch, _ = build(plan, 1, 0)
    for group, (a, b) in zip(batch.groups, pairwise((0, 2, 4, 6, 7)), strict=True):
        assert (group.start, group.stop) == (a, b)
        assert group.keys is not None
        assert group.keys.slot_BS.shape == (b - a, contexts[b - 1] + 1)


def test_a_step_that_fails_leaves_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that ends midway leaves a counter that would make later sums wrong."""
    mesh = stand_in_mesh(ParallelConfig(), CPU)
    model = Transformer(TINY, mesh, WeightFormat(torch.float32, CPU))
    owners = (m for m in model.modules() if isinstance(m, Linear | VocabParallelHead | Router))
    locks = [module.locks for module in owners]
    assert len(locks) > 8 and not any(bool(lock.any()) for lock in locks)
    layout = CacheLayout.make(TINY, "latent", "none", "fp32", 1, 0)
    cache = CachePool(layout, 2, CPU, mesh.tp)
    runner = Runner(model, cache, AbsorbRule(1))

    def fail(*_: object) -> None:
        for lock in locks:
            lock.fill_(3)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        runner.run([plan_of([(0, 1)])])
    assert not any(bool(lock.any()) for lock in locks)
