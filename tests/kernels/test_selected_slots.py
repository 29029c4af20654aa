"""Attention to selected positions: page tables of pages of one slot, in unselected poison."""

import math
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsv3_kernels import (
    PageTables,
    Paging,
    empty_parts,
    merge_lse,
    mha_decode,
    mla_decode,
    mla_decode_parts,
    open_parts,
    pack_latent,
    unpack_latent,
)
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.index.top_k import select_slots, top_candidates
from dsv3_kernels.testing import assert_close
from tests.kernels.definitions import attend

C, R, PAGE, SCALE = 32, 8, 16, 0.1
FORMS = (torch.float32, torch.bfloat16, torch.uint8)
TOLERANCE = 4e-6
OPS = pytest.mark.parametrize("op", ["reference", "kernel"])
FORM = pytest.mark.parametrize("form", FORMS)


class Selection(NamedTuple):
    """The selected positions of some queries, and a rank's slots of them."""

    positions: list[list[int]]
    tables: PageTables


def select(lengths: list[int], queries: int, k: int, shards: int) -> list[Selection]:
    """Return k random positions for each of the last queries of sequences, on every rank."""
    pages = [-(-n // PAGE) for n in lengths]
    page_BG = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    order = (torch.randperm(sum(pages)) + 1).int().split(pages)
    for b, chosen in enumerate(order):
        page_BG[b, : len(chosen)] = chosen
    pos = torch.tensor([[n - queries + i for i in range(queries)] for n in lengths])
    score = torch.randn(len(lengths) * queries, page_BG.shape[1] * PAGE)
    every = [PageTables(page_BG, pos, Paging(PAGE, shards, shard)) for shard in range(shards)]
    shares = [score[:, shard::shards].contiguous() for shard in range(shards)]
    found = [top_candidates(own, k, tables) for own, tables in zip(shares, every, strict=True)]
    positions = []
    for t, last in enumerate(pos.flatten().tolist()):
        best = score[t, : last + 1].topk(min(k, last + 1)).indices
        positions.append(best.sort().values.tolist())
    return [Selection(positions, select_slots(torch.stack(found), k, own)) for own in every]


def make_cache(entries: Tensor, tables: PageTables, form: torch.dtype, op: str) -> Tensor:
    """Return a cache of entries [slots, X], of which all but the selected ones are NaN.

    The reference also reads slot 0, which fills up tables, without weight.
    """
    num = tables.query_pos_BQ + 1
    is_selected = torch.arange(tables.page_BG.shape[1]) < num
    kept = tables.page_BG[is_selected].long()
    packed = form == torch.uint8
    stored = pack_latent(entries, C) if packed else entries.to(form)
    cache = torch.full_like(stored, 0x7F if packed else torch.nan)
    cache[kept] = stored[kept]
    if op == "reference":
        cache[0] = stored[0]
    return cache


def as_stored(entries: Tensor, form: torch.dtype) -> Tensor:
    if form == torch.uint8:
        return unpack_latent(pack_latent(entries, C), C, torch.float32)
    return entries.to(form).float()


@OPS
@FORM
@pytest.mark.parametrize(("heads", "k", "shards"), [(16, 64, 1), (20, 7, 4), (128, 33, 2)])
def test_mla_decode(heads: int, k: int, shards: int, form: torch.dtype, op: str) -> None:
    """The selected positions of all ranks, merged: the definition of sparse attention."""
    torch.manual_seed(k)
    lengths, queries = [90, 3], 2
    T = len(lengths) * queries
    dtype = torch.float32 if form == torch.float32 else torch.bfloat16
    q = torch.randn(T, 1, heads, C + R).to(dtype)
    ranks = select(lengths, queries, k, shards)
    slots = 1 + max(int(rank.tables.page_BG.max()) for rank in ranks)
    parts, entry_of = [], {}
    for shard, (positions, tables) in enumerate(ranks):
        entries = torch.randn(slots, C + R)
        cache, stored = make_cache(entries, tables, form, op), as_stored(entries, form)
        parts.append(getattr(mla_decode, op)(q, cache, tables, C, SCALE))
        for t in range(T):
            own = [p for p in positions[t] if p % shards == shard]
            assert len(own) == int(tables.query_pos_BQ[t, 0]) + 1
            for i, p in enumerate(own):
                entry_of[t, p] = stored[int(tables.page_BG[t, i])]
    o, lse = merge_lse(
        torch.stack([part.o[:, 0] for part in parts]),
        torch.stack([part.lse[:, 0] for part in parts]),
    )
    for t in range(T):
        key = torch.stack([entry_of[t, p] for p in ranks[0].positions[t]])
        for h in range(0, heads, 5):
            want_o, want_lse = attend(q[t, 0, h].float(), key, key[:, :C], SCALE)
            assert_close(f"o {t} {h}", o[t, h], want_o, 1e-5)
            assert_close(f"lse {t} {h}", lse[t, h], torch.tensor(want_lse), 1e-5)


def both(selection: Selection, form: torch.dtype) -> tuple[PartialOutputs, PartialOutputs]:
    """Return results of 16 heads by the kernel and by the reference."""
    tables = selection.tables
    entries = torch.randn(int(tables.page_BG.max()) + 1, C + R)
    q = torch.randn(len(tables.page_BG), 1, 16, C + R)
    cache = make_cache(entries, tables, form, "kernel")
    got = mla_decode.kernel(q, cache, tables, C, SCALE)
    cache = make_cache(entries, tables, form, "reference")
    return got, mla_decode.reference(q, cache, tables, C, SCALE)


@FORM
def test_queries_without_a_selected_position(form: torch.dtype) -> None:
    """Padding, and queries whose positions are all on other ranks, among others."""
    torch.manual_seed(1)
    (selection,) = select([70, 40], 3, 20, 1)
    selection.tables.query_pos_BQ[[1, 4]] = -1
    selection.tables.page_BG[[1, 4]] = 0
    got, want = both(selection, form)
    assert bool((got.o[[1, 4]] == 0).all()) and bool((got.lse[[1, 4]] == -math.inf).all())
    assert_close("o", got.o, want.o, TOLERANCE)
    assert_close("lse", got.lse, want.lse, TOLERANCE)


@FORM
@pytest.mark.parametrize("at_once", [32, 64])
def test_many_queries_of_a_prompt(
    at_once: int, form: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More sequences than are numbered at a time, and fewer, short ones first."""
    torch.manual_seed(2)
    module = sys.modules["dsv3_kernels.attention._mla_decode_kernel"]
    monkeypatch.setattr(module, "numbered_at_once", lambda sequences: at_once)
    (selection,) = select([40], 40, 24, 1)
    got, want = both(selection, form)
    assert_close("o", got.o, want.o, TOLERANCE)
    assert_close("lse", got.lse, want.lse, TOLERANCE)


@OPS
@FORM
def test_mla_decode_parts(form: torch.dtype, op: str) -> None:
    torch.manual_seed(3)
    ranks, heads, T = 3, 4, 6
    dtype = torch.float32 if form == torch.float32 else torch.bfloat16
    q = torch.randn(ranks, T, heads, C + R).to(dtype)
    for _, tables in select([90, 33], 3, 24, 2):
        entries, parts = torch.randn(200, C + R), empty_parts(q, C)
        cache = make_cache(entries, tables, form, op)
        getattr(mla_decode_parts, op)(q, cache, tables, SCALE, parts)
        cache = make_cache(entries, tables, form, "reference")
        together = q.transpose(0, 1).reshape(T, 1, ranks * heads, C + R)
        want: PartialOutputs = mla_decode.reference(together, cache, tables, C, SCALE)
        got = open_parts(parts)
        tolerance = TOLERANCE if got.o.dtype == torch.float32 else 2**-7
        want_o = want.o.view(T, ranks, heads, C).transpose(0, 1)
        assert_close("o", got.o, want_o, tolerance)
        assert_close("lse", got.lse, want.lse.view(T, ranks, heads).transpose(0, 1), TOLERANCE)


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mha_decode(dtype: torch.dtype, op: str) -> None:
    """Expanded keys and values, of every second query of a batch without padding."""
    torch.manual_seed(4)
    (selection,) = select([90, 20], 2, 24, 1)
    tables, heads = selection.tables, 3
    tables.query_pos_BQ[2] = -1
    tables.page_BG[2] = 0
    num = tables.query_pos_BQ + 1
    kept = tables.page_BG[torch.arange(tables.page_BG.shape[1]) < num].long()
    entries = torch.randn(200, heads * (24 + 16)).to(dtype)
    cache = torch.full_like(entries, torch.nan)
    cache[kept] = entries[kept]
    q = torch.randn(4, heads, 24).to(dtype)
    if op == "reference":  # it reads the slots that fill up tables, without weight
        cache[0] = entries[0]
    o = getattr(mha_decode, op)(q, cache, tables, SCALE)
    for t in range(4):
        slot = tables.page_BG[t, : int(num[t, 0])].long()
        key = entries[slot].float().view(-1, heads, 40)
        for h in range(heads):
            want, _ = attend(q[t, h].float(), key[:, h, :24], key[:, h, 24:], SCALE)
            assert_close(f"o {t} {h}", o[t, h], want, 1e-5)
