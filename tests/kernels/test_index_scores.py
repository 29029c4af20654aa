"""Index scores over scattered pages; keys that no query sees are poison."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsv3_kernels import PageTables, Paging
from dsv3_kernels.fp8_format import FP8
from dsv3_kernels.index.index_cache import IndexCache, hadamard, quantize_index
from dsv3_kernels.index.index_scores import index_scores, launch_index_scores
from dsv3_kernels.index.top_k import candidate_positions, select_slots, top_candidates
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.index_pages import FORMS, scatter_keys

FORM = pytest.mark.parametrize("form", FORMS)


class Arguments(NamedTuple):
    """Arguments of `index_scores`."""

    q: Tensor
    weight: Tensor
    cache: IndexCache
    tables: PageTables


def make(
    lengths: list[int], queries: int, heads: int, dim: int, paging: Paging, form: torch.dtype
) -> tuple[list[Tensor], Arguments]:
    """Return keys and arguments; the queries are the last positions, weights of both signs."""
    torch.manual_seed(0)
    keys = [torch.randn(n, dim) for n in lengths]
    pos = torch.tensor([[n - queries + i for i in range(queries)] for n in lengths])
    cache, tables = scatter_keys(keys, pos, paging, form)
    q = torch.randn(len(lengths) * queries, heads, dim)
    q = quantize_index(q)[0] if form == torch.uint8 else q.to(form)
    return keys, Arguments(q, torch.randn(len(q), heads), cache, tables)


def stored(key_SI: Tensor, form: torch.dtype) -> Tensor:
    """Return keys as the cache returns them, in float64."""
    if form != torch.uint8:
        return key_SI.to(form).double()
    quantized, scale = quantize_index(key_SI)
    return quantized.double() * scale[:, None]


def by_kernel(args: Arguments, keys: int = 16, programs: int = 4096) -> Tensor:
    return launch_index_scores(*args, keys=keys, programs=programs)


def seen_by(tables: PageTables) -> Tensor:
    """Return [B * Q, capacity]: True where a query sees a key."""
    paging = tables.paging
    position = torch.arange(tables.capacity) * paging.shards + paging.shard
    return position <= tables.query_pos_BQ.reshape(-1, 1)


@FORM
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("op", [index_scores.reference, index_scores.kernel])
def test_index_scores(op: Callable[..., Tensor], shards: int, form: torch.dtype) -> None:
    """The definition, one query and key at a time; products of FP8 values are exact."""
    lengths, queries, paging = [5, 70, 33], 3, Paging(16, shards, shards - 1)
    keys, args = make(lengths, queries, 20, 32, paging, form)
    score = op(*args)
    assert score.dtype == torch.float32 and score.shape == (9, args.tables.capacity)
    q, weight = args.q.double(), args.weight.double()
    for b, key in enumerate(keys):
        k = stored(key, form)
        for i in range(queries):
            row, last = b * queries + i, int(args.tables.query_pos_BQ[b, i])
            want = torch.relu(q[row] @ k[: last + 1].T).T @ weight[row]
            want = want[paging.shard :: shards]
            assert_close(f"row {row}", score[row, : len(want)], want, 1e-5)


@FORM
@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "dim"),
    [
        ([1, 40, 200, 17], 1, 64, 128),
        ([40, 3], 2, 4, 32),
        ([150], 21, 32, 64),
        ([70, 33], 5, 3, 128),
    ],
)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_kernel(
    shards: int,
    lengths: list[int],
    queries: int,
    heads: int,
    dim: int,
    form: torch.dtype,
) -> None:
    """Several pages to a block and several blocks to a page, a padding query and sequence."""
    for shard in {0, shards - 1}:
        longer = [max(n, queries) for n in lengths]
        _, args = make(longer, queries, heads, dim, Paging(32, shards, shard), form)
        args.tables.query_pos_BQ[-1, -1] = -1
        if len(lengths) > 2:
            args.tables.query_pos_BQ[1] = -1
        seen = seen_by(args.tables)
        want = index_scores.reference(*args)
        for keys, programs in ((16, 4096), (64, 5)):
            got = by_kernel(args, keys, programs)
            assert_close("seen", got.where(seen, 0.0), want.where(seen, 0.0), 2e-6)


def test_scores_of_positions_that_are_not_seen_are_not_computed() -> None:
    """Memory after a sequence's last query keeps its poison."""
    _, args = make([40, 100], 2, 4, 32, Paging(16), torch.uint8)
    args.tables.query_pos_BQ[0] = -1
    score = by_kernel(args).unflatten(0, (2, 2))
    assert bool(score[0].isnan().all()), "a padding sequence costs no block"
    assert bool(score[1, :, 100:].isnan().all()) and not bool(score[1, :, :100].isnan().any())
    assert float(score[1, 0, 99]) == -math.inf, "the last key, which the first query does not see"


@FORM
def test_a_score_does_not_depend_on_the_batch(form: torch.dtype) -> None:
    _, args = make([129, 40, 3], 2, 20, 64, Paging(16, 2, 1), form)
    score, seen = by_kernel(args), seen_by(args.tables)
    for b in range(3):
        rows = slice(2 * b, 2 * b + 2)
        one = Arguments(
            args.q[rows], args.weight[rows], args.cache, args.tables.sequences(b, b + 1)
        )
        alone = by_kernel(one, programs=2)
        assert_bitwise_equal("alone", alone[seen[rows]], score[rows][seen[rows]])


def test_negative_weights_and_no_positive_product() -> None:
    """Scores below zero, and of keys that no head likes, which are zero."""
    _, args = make([64], 1, 4, 32, Paging(16), torch.float32)
    args.weight.fill_(-1.0)
    args.cache.slots[:] = args.cache.slots.abs()
    args.q[:] = args.q.abs()
    score = by_kernel(args)[:, :64]
    assert bool((score < 0).all())
    assert_close("below zero", score, index_scores.reference(*args)[:, :64], 2e-6)
    args.q.neg_()
    assert bool((by_kernel(args)[:, :64] == 0).all())


@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_fp8_pages_read_token_interleaved_would_select_other_positions(op: str) -> None:
    """The values of a page come first, then its scales: no reader may take a row for an entry."""
    dim, k, n = 64, 40, 200
    for slots_per_page in (16, 1):
        paging = Paging(slots_per_page)
        keys, args = make([n], 1, 8, dim, paging, torch.uint8)
        page_G = args.tables.page_BG[0, : -(-n // slots_per_page)]
        assert len(page_G) > 2 and int(page_G[0]) > 0
        score = getattr(index_scores, op)(*args)
        best = getattr(top_candidates, op)(score, k, args.tables)
        positions = candidate_positions(best)[0]
        # Numbers that do not depend on any reader of pages.
        weighted = torch.relu(args.q[0].float() @ stored(keys[0], torch.uint8).float().T)
        want = (args.weight[0] @ weighted).topk(k).indices.sort().values
        assert positions.tolist() == want.tolist()
        selected = getattr(select_slots, op)(best[None], k, args.tables)
        slot = page_G.repeat_interleave(slots_per_page) * slots_per_page
        slot += torch.arange(len(slot)) % slots_per_page
        assert selected.page_BG[0].tolist() == slot[positions].tolist()
        # The same bytes, as if every key were followed by its scale.
        entry = args.cache.slots[slot.long()]
        values = entry[:, :dim].contiguous().view(FP8).float()
        scale = entry[:, dim:].contiguous().view(torch.float32)
        wrong = args.weight[0] @ torch.relu(args.q[0].float() @ (values * scale).T)
        other = wrong.nan_to_num(0.0).topk(k).indices.sort().values
        if slots_per_page == 1:
            assert other.tolist() == want.tolist(), "pages of one slot look the same either way"
        else:
            assert len(set(other.tolist()) & set(want.tolist())) < k // 2


def test_fp8_pages_are_values_then_scales() -> None:
    """The bytes of a page, at an address that does not begin the memory."""
    torch.manual_seed(1)
    key = torch.randn(40, 32)
    cache, tables = scatter_keys([key], torch.tensor([[39]]), Paging(16), torch.uint8)
    assert cache.slots.storage_offset() > 0
    values, scale = quantize_index(key)
    memory = cache.slots.flatten()
    for p in range(40):
        page, at = int(tables.page_BG[0, p // 16]), p % 16
        first = page * 16 * (32 + 4)
        got = memory[first + at * 32 : first + at * 32 + 32]
        assert_bitwise_equal(f"values {p}", got.view(FP8), values[p])
        at = first + 16 * 32 + 4 * at
        assert_bitwise_equal(f"scale {p}", memory[at : at + 4].view(torch.float32), scale[p, None])


def test_rotation_and_quantization_keep_products() -> None:
    """Scores in FP8 approximate those of the keys before they were rotated."""
    torch.manual_seed(2)
    q, key, weight = torch.randn(1, 8, 128), torch.randn(300, 128), torch.rand(1, 8)
    paging, pos = Paging(16), torch.tensor([[299]])
    cache, tables = scatter_keys([key], pos, paging, torch.uint8)
    quantized, scale = quantize_index(q)
    got = index_scores(quantized, weight * scale, cache, tables)[:, :300]
    want = weight @ torch.relu(q[0] @ key.T)
    assert float((got - want).norm() / want.norm()) < 0.03
    assert_close("rotated", hadamard(q) @ hadamard(key).T, q @ key.T, 1e-5)
