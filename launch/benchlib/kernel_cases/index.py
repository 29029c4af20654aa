"""Cases of the lightning indexer at DeepSeek-V3.2's shapes, and of attention to its selection."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchlib.kernel_cases.case import FP8_TOL, HEADS, Args, C, Case, N, R, normal
from dsv3_kernels.attention.kv_fp8 import pack_latent, packed_bytes
from dsv3_kernels.attention.mla_decode import mla_decode
from dsv3_kernels.attention.paging import PageTables, Paging
from dsv3_kernels.attention.rope import Rotation
from dsv3_kernels.index.index_cache import IndexCache, index_key_bytes, quantize_index
from dsv3_kernels.index.index_key import IndexWrite, write_index_keys
from dsv3_kernels.index.index_query import index_queries
from dsv3_kernels.index.index_scores import index_scores
from dsv3_kernels.index.top_k import select_slots, top_candidates

_INDEX_HEADS = 64
_DIM = 128
_TOP = 2048
_PAGE = 64


def _pages_of(positions: int) -> int:
    """Return the number of pages of some positions."""
    return -(-positions // _PAGE)


def index_inputs(small: bool) -> Iterator[Case]:
    """Yield the index keys and queries of new tokens."""
    for T, is_fp8 in [(3, True), (3, False)] if small else [(t, True) for t in (1, 128, 2048)]:

        def rotation(d: torch.device, T: int = T) -> Rotation:
            angle = torch.rand(T, R // 2, device=d)
            return Rotation(angle.cos(), angle.sin(), False)

        def write(
            d: torch.device,
            T: int = T,
            is_fp8: bool = is_fp8,
            rotation: Callable[..., Rotation] = rotation,
        ) -> Args:
            cache = _cache(_pages_of(T), is_fp8, d)
            key = normal(T, _DIM, device=d)
            weight = torch.rand(_DIM, device=d) + 0.5
            slot = torch.arange(T, device=d)
            return (IndexWrite(key, weight, weight - 1, rotation(d), cache, slot),)

        def queries(
            d: torch.device,
            T: int = T,
            is_fp8: bool = is_fp8,
            rotation: Callable[..., Rotation] = rotation,
        ) -> Args:
            q = normal(T, _INDEX_HEADS, _DIM, device=d)
            parts = torch.randn(16, T, _INDEX_HEADS, device=d)
            return q, parts, rotation(d), is_fp8

        name = f"T {T}, {'fp8' if is_fp8 else 'bf16'} keys"
        width = index_key_bytes(_DIM) if is_fp8 else 2 * _DIM
        yield Case(
            "write_index_keys",
            name,
            write,
            _keys_by_kernel,
            _keys_by_reference,
            T * (2 * _DIM + 4 * R + width),
            tol=FP8_TOL,
        )
        moved = T * _INDEX_HEADS * (2 * _DIM + width + 16 * 4)
        view = _scaled_queries
        yield Case.of(index_queries, name, queries, moved, tol=FP8_TOL, view=view)


def _cache(pages: int, is_fp8: bool, device: torch.device) -> IndexCache:
    """Return a cache of zeros, with a page before the first one that is used."""
    width = index_key_bytes(_DIM) if is_fp8 else _DIM
    dtype = torch.uint8 if is_fp8 else torch.bfloat16
    slots = torch.zeros((pages + 1) * _PAGE, width, dtype=dtype, device=device)
    return IndexCache(slots, _PAGE)


def _keys_by_kernel(write: IndexWrite) -> Tensor:
    write_index_keys.kernel(write)
    return write.cache.read(write.slot_T)


def _keys_by_reference(write: IndexWrite) -> Tensor:
    write = replace(write, cache=IndexCache(torch.zeros_like(write.cache.slots), _PAGE))
    write_index_keys.reference(write)
    return write.cache.read(write.slot_T)


def _scaled_queries(result: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries times their weights: a scale may be the next power of two."""
    q_THI, weight_TH = result
    return q_THI.float() * weight_TH.unsqueeze(-1)


def selection(small: bool) -> Iterator[Case]:
    """Yield scores, selections and attention of decoding sequences, and of a chunk of a prompt."""
    sizes = [(2, 1, 150), (1, 5, 150)]
    if not small:
        sizes = [(batch, 1, context) for context in (4096, 65536) for batch in (1, 8, 128)]
        sizes += [(1, 512, 32768)]
    for batch, queries, context in sizes:
        k = 40 if small else _TOP
        yield _index_scores(batch, queries, context)
        yield from _top_k(batch * queries, context, k)
    for T in (3,) if small else (1, 8, 128, 1024):
        for heads in (4,) if small else (HEADS, 8 * HEADS):
            for is_packed in (False, True):
                yield _attention(T, heads, 40 if small else _TOP, is_packed)


def _index_scores(batch: int, queries: int, context: int) -> Case:
    pages = _pages_of(context)

    def operands(d: torch.device) -> Args:
        cache = _cache(batch * pages, True, d)
        cache.write(torch.arange(_PAGE, len(cache.slots), device=d), _keys(batch * pages, d))
        page_BG = (torch.randperm(batch * pages, device=d).view(batch, pages) + 1).int()
        last = torch.arange(context - queries, context, device=d).expand(batch, -1)
        q, scale = quantize_index(normal(batch * queries, _INDEX_HEADS, _DIM, device=d))
        weight = torch.randn(batch * queries, _INDEX_HEADS, device=d) * scale
        return q, weight, cache, PageTables(page_BG, last, Paging(_PAGE))

    keys = batch * context
    return Case(
        "index_scores",
        f"B {batch}, Q {queries}, S {context}, H {_INDEX_HEADS}, fp8",
        operands,
        lambda *args: _seen(index_scores.kernel(*args), args[3]),
        lambda *args: _seen(index_scores.reference(*args), args[3]),
        keys * index_key_bytes(_DIM) + 4 * keys * queries + batch * queries * _INDEX_HEADS * _DIM,
        2.0 * keys * queries * _INDEX_HEADS * _DIM,
        "fp8",
        tol=1e-3,
    )


def _keys(pages: int, device: torch.device) -> Tensor:
    return normal(pages * _PAGE, _DIM, device=device)


def _seen(score_TS: Tensor, tables: PageTables) -> Tensor:
    """Return scores, 0 where a query does not see the key."""
    is_later_TS = torch.arange(tables.capacity, device=score_TS.device) > (
        tables.query_pos_BQ.reshape(-1, 1)
    )
    return score_TS.masked_fill(is_later_TS, 0.0)


def _top_k(T: int, context: int, k: int) -> Iterator[Case]:
    """Yield the selection of a rank that stores every position, and the merge of eight ranks."""

    def tables(d: torch.device, shards: int = 1) -> PageTables:
        pages = torch.zeros(T, _pages_of(context * shards), dtype=torch.int32, device=d)
        last = torch.full((T, 1), context - 1, device=d)
        return PageTables(pages, last, Paging(_PAGE, shards, shards - 1))

    def scores(d: torch.device) -> Args:
        width = _pages_of(context) * _PAGE
        return torch.randn(T, width, device=d).round(decimals=2), k, tables(d)

    def candidates(d: torch.device) -> Args:
        score = torch.randn(8, T, _pages_of(context) * _PAGE, device=d).round(decimals=2)
        ranks = [replace(tables(d, 8), paging=Paging(_PAGE, 8, shard)) for shard in range(8)]
        found = [top_candidates.reference(score[i], k, own) for i, own in enumerate(ranks)]
        return torch.stack(found), k, ranks[-1]

    name = f"T {T}, S {context}, k {k}"
    yield Case.of(top_candidates, name, scores, T * (4 * context + 8 * k), tol=0.0)
    yield Case.of(
        select_slots,
        f"8 x {name}",
        candidates,
        T * (8 * 8 * k + 4 * k),
        tol=0.0,
        view=lambda selected: (selected.page_BG, selected.query_pos_BQ),
    )


def _attention(T: int, heads: int, k: int, is_packed: bool) -> Case:
    """Return the case of attention to k scattered slots for each of T queries."""
    width = packed_bytes(C, R) if is_packed else 2 * (C + R)
    slots = 32768 if k == _TOP else 200

    def operands(d: torch.device) -> Args:
        entries = normal(slots, C + R, device=d)
        cache = pack_latent(entries, C) if is_packed else entries
        slot_TK = torch.rand(T, slots, device=d).topk(k).indices.sort().values.int()
        tables = PageTables(slot_TK, torch.full((T, 1), k - 1, device=d), Paging(1))
        return normal(T, 1, heads, C + R, device=d), cache, tables, C, (N + R) ** -0.5

    return Case.of(
        mla_decode,
        f"B {T}, {k} selected slots, H {heads}, {'fp8' if is_packed else 'bf16'} cache",
        operands,
        min(T * k, slots) * width + T * heads * (2 * (C + R) + 4 * C),
        2.0 * T * heads * k * (2 * C + R),
        tol=1e-2,
    )
