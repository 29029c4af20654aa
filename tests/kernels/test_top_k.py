"""Exact selection by index scores: adversarial ties, many parts, and the merge over ranks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv3_kernels import PageTables, Paging
from dsv3_kernels.index._top_k_kernels import launch_top_candidates
from dsv3_kernels.index.top_k import (
    NO_CANDIDATE,
    candidate_positions,
    select_slots,
    top_candidates,
)
from dsv3_kernels.testing import assert_bitwise_equal

PAGE = 16
INF = float("inf")

Top = Callable[[Tensor, int, PageTables], Tensor]


def in_parts(block: int) -> Top:
    """Return `top_candidates` by programs of few scores."""
    return lambda score, k, tables: launch_top_candidates(score, k, tables, block)


TOPS: dict[str, Top] = {
    "reference": top_candidates.reference,
    "kernel": top_candidates.kernel,
    "three parts": in_parts(64),
    "ten parts": in_parts(16),
}
SHARDS = pytest.mark.parametrize("shards", [1, 2, 4, 8])


def best(score_S: Tensor, k: int, last: int) -> list[int]:
    """Return the definition: higher score, then lower position; in order of position."""
    scores = (score_S[: last + 1] + 0.0).tolist()
    return sorted(sorted(range(len(scores)), key=lambda p: (-scores[p], p))[:k])


def rows(width: int) -> dict[str, Tensor]:
    """Return rows of scores that selections go wrong at."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(width, generator=generator)
    few = torch.randint(-2, 3, (width,), generator=generator).float()
    signs = torch.where(torch.rand(width, generator=generator) < 0.5, 0.0, -0.0)
    tiny = torch.finfo(torch.float32).smallest_normal
    return {
        "normal": normal,
        "all equal": torch.full((width,), -1.5),
        "both zeros": signs,
        "zeros among others": torch.where(normal > 0.5, few, signs),
        "few values": few,
        "rising": torch.arange(width).float(),
        "falling": -torch.arange(width).float(),
        "next to each other": torch.full((width,), 1.0) + normal * 1e-7,
        "subnormal": normal * tiny,
        "huge": normal * 3e38,
        "infinite": torch.where(normal > 1.5, INF, torch.where(normal < -1.5, -INF, few)),
    }


def tables_of(width: int, last_T: Tensor, paging: Paging) -> PageTables:
    """Return tables of sequences of one query, of distinct scattered pages."""
    pages = -(-width // paging.page_size)
    page_TG = (torch.randperm(len(last_T) * pages) + 1).view(len(last_T), pages).int()
    return PageTables(page_TG, last_T[:, None], paging)


def share(score_TS: Tensor, paging: Paging) -> Tensor:
    """Return the columns that a rank stores, poisoned up to whole pages."""
    own = score_TS[:, paging.shard :: paging.shards]
    width = -(-score_TS.shape[1] // paging.page_size) * paging.slots_per_page
    return torch.nn.functional.pad(own, (0, width - own.shape[1]), value=torch.nan)


@pytest.mark.parametrize("top", TOPS.values(), ids=TOPS.keys())
@pytest.mark.parametrize("k", [1, 8, 64, 300])
def test_top_candidates(top: Top, k: int) -> None:
    width = 150
    score = torch.stack(list(rows(width).values()))
    last = torch.tensor([149, 149, 149, 70, 63, 8, 149, 0, 149, -1, 100])
    score[torch.arange(width) > last[:, None]] = torch.nan  # nothing may read them
    tables = tables_of(width, last, Paging(PAGE))
    got = top(share(score, tables.paging), k, tables)
    assert got.dtype == torch.int64 and got.shape == (11, min(k, 160))
    for t in range(len(score)):
        want = best(score[t], k, int(last[t]))
        assert candidate_positions(got[t]).tolist()[: len(want)] == want
        assert bool((got[t, len(want) :] == NO_CANDIDATE).all())


@SHARDS
@pytest.mark.parametrize("op", ["reference", "kernel"])
@pytest.mark.parametrize("k", [8, 40])
def test_ranks_select_as_one(k: int, op: str, shards: int) -> None:
    """Every rank's slots, from the candidates of all, in every kind of row."""
    torch.manual_seed(shards)
    width = 200
    score = torch.stack(list(rows(width).values()))
    last = torch.randint(0, width, (len(score),))
    last[-1], last[2] = -1, 3
    ranks = [Paging(PAGE, shards, shard) for shard in range(shards)]
    page_TG = tables_of(width, last, ranks[0]).page_BG
    tables = [PageTables(page_TG, last[:, None], paging) for paging in ranks]
    top, select = getattr(top_candidates, op), getattr(select_slots, op)
    found = torch.stack([top(share(score, each.paging), k, each) for each in tables])
    for each in tables:
        paging, selected = each.paging, select(found, k, each)
        assert selected.paging == Paging(1) and selected.page_BG.dtype == torch.int32
        assert selected.page_BG.shape == (len(score), min(k, shards * found.shape[2]))
        for t in range(len(score)):
            own = [p for p in best(score[t], k, int(last[t])) if p % shards == paging.shard]
            slots = [
                int(page_TG[t, p // PAGE]) * paging.slots_per_page + p % PAGE // shards for p in own
            ]
            assert int(selected.query_pos_BQ[t, 0]) == len(own) - 1
            padding = [0] * (selected.page_BG.shape[1] - len(own))
            assert selected.page_BG[t].tolist() == slots + padding


@SHARDS
def test_kernel_selects_as_the_reference(shards: int) -> None:
    """Several queries of a sequence share its table; positions with ties over all ranks."""
    torch.manual_seed(shards)
    pos = torch.tensor([[3, 47], [-1, 90], [119, -1]])
    score = torch.randint(-3, 4, (6, 120)).float()
    page_BG = (torch.randperm(24) + 1).view(3, 8).int()
    ranks = [PageTables(page_BG, pos, Paging(PAGE, shards, s)) for s in range(shards)]
    found = torch.stack([top_candidates(share(score, each.paging), 32, each) for each in ranks])
    for each in ranks:
        kernel, want = select_slots.kernel(found, 32, each), select_slots.reference(found, 32, each)
        assert_bitwise_equal("slots", kernel.page_BG, want.page_BG)
        assert_bitwise_equal("numbers", kernel.query_pos_BQ, want.query_pos_BQ)


def test_long_rows_and_the_models_k() -> None:
    """Contexts of one, of few and of all parts; another width than the tables'."""
    torch.manual_seed(0)
    S = 40_000
    last = torch.tensor([S - 1, 17_000, 2_047, 2_048, -1])
    score = torch.randn(5, S + 8)[:, 3 : S + 3]
    score[0, 100:30_000] = 2.5  # more equal scores than are wanted, over several parts
    tables = PageTables(torch.zeros(5, S, dtype=torch.int32), last[:, None], Paging(1))
    got = top_candidates.kernel(score, 2048, tables)
    assert_bitwise_equal("long rows", got, top_candidates.reference(score, 2048, tables))


@pytest.mark.parametrize("rows_wanted", [0, 2])
def test_no_rows_and_rows_of_one_score(rows_wanted: int) -> None:
    tables = tables_of(1, torch.arange(rows_wanted) - 1, Paging(1))
    score = torch.ones(rows_wanted, 1)
    for top in (top_candidates.kernel, top_candidates.reference):
        got = top(score, 5, tables)
        assert got.shape == (rows_wanted, 1)
        assert candidate_positions(got).flatten().tolist() == [-1, 0][:rows_wanted]
        for select in (select_slots.kernel, select_slots.reference):
            selected = select(got[None], 5, tables)
            assert selected.query_pos_BQ.flatten().tolist() == [-1, 0][:rows_wanted]
