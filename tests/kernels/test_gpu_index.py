"""The lightning indexer's kernels on a real GPU (TRITON_INTERPRET=0), at V3.2's shapes."""

from dataclasses import replace

import pytest
import torch

from dsv3_kernels import (
    IndexCache,
    IndexWrite,
    PageTables,
    Paging,
    Rotation,
    index_key_bytes,
    index_queries,
    index_scores,
    select_slots,
    top_candidates,
    write_index_keys,
)
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HEADS, DIM, PAGE, TOP = 64, 128, 64, 2048
FORMS = (torch.float32, torch.bfloat16, torch.uint8)
# Of the largest result, derived from the formats and unmeasured. Hopper's units add 128 products of
# e4m3 with 14 bits; the heads are added in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.uint8: 1e-3}


def cache_of(slots: int, form: torch.dtype, device: str) -> IndexCache:
    width = index_key_bytes(DIM) if form == torch.uint8 else DIM
    return IndexCache(torch.zeros(slots, width, dtype=form, device=device), PAGE)


def rotation_of(tokens: int) -> Rotation:
    angle = torch.rand(tokens, 32) * 50
    return Rotation(angle.cos(), angle.sin(), False)


def on_gpu(rotation: Rotation) -> Rotation:
    return Rotation(rotation.cos_Tr.cuda(), rotation.sin_Tr.cuda(), rotation.interleaved)


@pytest.mark.parametrize("form", FORMS)
def test_write_index_keys(form: torch.dtype) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if form == torch.float32 else torch.bfloat16
    write = IndexWrite(
        key_TI=torch.randn(50, 2240).to(dtype)[:, 2112:],
        weight_I=torch.rand(DIM) + 0.5,
        bias_I=torch.randn(DIM),
        rotation=rotation_of(50),
        cache=cache_of(128, form, "cpu"),
        slot_T=torch.randperm(128)[:50].where(torch.rand(50) < 0.7, torch.tensor(-1)),
    )
    moved = IndexWrite(
        key_TI=write.key_TI.cuda(),
        weight_I=write.weight_I.cuda(),
        bias_I=write.bias_I.cuda(),
        rotation=on_gpu(write.rotation),
        cache=cache_of(128, form, "cuda"),
        slot_T=write.slot_T.cuda(),
    )
    write_index_keys(write)
    write_index_keys(moved)
    slot = torch.arange(128)
    got, want = moved.cache.read(slot.cuda()).cpu(), write.cache.read(slot)
    # A step of e4m3 at the largest values, a last place of bfloat16.
    assert_close("keys", got, want, 2**-3 if form == torch.uint8 else 2**-7)
    assert bool((got[want.abs().sum(1) == 0] == 0).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "queries", "shards"), [(1, 1, 1), (5, 2, 8), (1, 100, 1)])
def test_scores_and_selection(form: torch.dtype, batch: int, queries: int, shards: int) -> None:
    """The scores of the reference; of the kernel's scores, exactly the reference's selection."""
    torch.manual_seed(1)
    is_fp8, dtype = form == torch.uint8, torch.float32 if form == torch.float32 else torch.bfloat16
    T, pages = batch * queries, 700
    paging = Paging(PAGE * shards, shards, shards - 1)
    cache = cache_of((batch * pages + 1) * PAGE, form, "cpu")
    cache.write(torch.arange(PAGE, len(cache.slots)), torch.randn(len(cache.slots) - PAGE, DIM))
    page_BG = (torch.randperm(batch * pages) + 1).view(batch, pages).int()
    pos = torch.randint(0, pages * PAGE * shards, (batch, 1)) + torch.arange(queries) - queries
    tables = PageTables(page_BG, pos.clamp_min(-1), paging)
    moved = PageTables(page_BG.cuda(), tables.query_pos_BQ.cuda(), paging)
    q, parts = torch.randn(T, HEADS, DIM).to(dtype), torch.randn(16, T, HEADS)
    rotation = rotation_of(T)
    queried = index_queries(q.cuda(), parts.cuda(), on_gpu(rotation), is_fp8)
    q_THI, weight_TH = (x.cpu() for x in queried)
    want = index_scores(q_THI, weight_TH, cache, tables)
    score = index_scores(*queried, IndexCache(cache.slots.cuda(), PAGE), moved)
    is_seen = want > float("-inf")
    got = score.cpu().where(is_seen, 0.0)
    assert_close("scores", got, want.where(is_seen, 0.0), TOLERANCE[form])
    found = top_candidates(score, TOP, moved)
    assert_bitwise_equal("found", found.cpu(), top_candidates(score.cpu(), TOP, tables))
    ranks = torch.randn(shards, T, score.shape[1]).round(decimals=1)
    every = [replace(tables, paging=replace(paging, shard=shard)) for shard in range(shards)]
    candidates = torch.stack([top_candidates(ranks[i], TOP, own) for i, own in enumerate(every)])
    selected = select_slots(candidates.cuda(), TOP, moved)
    expected = select_slots(candidates, TOP, tables)
    assert_bitwise_equal("slots", selected.page_BG.cpu(), expected.page_BG)
    assert_bitwise_equal("numbers", selected.query_pos_BQ.cpu(), expected.query_pos_BQ)


def test_a_graph_follows_the_contexts() -> None:
    """Captured once, replayed for longer contexts."""
    torch.manual_seed(2)
    cache = cache_of(300 * PAGE, torch.uint8, "cuda")
    cache.write(torch.arange(len(cache.slots)).cuda(), torch.randn(len(cache.slots), DIM).cuda())
    page_BG = torch.randperm(300)[:298].view(2, 149).int().cuda()
    pos = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    tables = PageTables(page_BG, pos, Paging(PAGE))
    q, parts = torch.randn(2, HEADS, DIM).cuda(), torch.randn(1, 2, HEADS).cuda()
    rotation = on_gpu(rotation_of(2))

    def run() -> PageTables:
        queried = index_queries(q, parts, rotation, True)
        found = top_candidates(index_scores(*queried, cache, tables), TOP, tables)
        return select_slots(found[None], TOP, tables)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        selected = run()
    for last in (5, 9000, -1, 2047, 2048):
        pos.fill_(last)
        graph.replay()
        want = run()
        assert_bitwise_equal("slots", selected.page_BG, want.page_BG)
        assert_bitwise_equal("numbers", selected.query_pos_BQ, want.query_pos_BQ)
        assert selected.query_pos_BQ.tolist() == 2 * [[min(last, TOP - 1)]]
