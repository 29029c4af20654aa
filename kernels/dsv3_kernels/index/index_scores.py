"""Index scores of the cached positions that this rank stores.

I(t, s) = sum_h w_h(t) relu(q_h(t) . k(s)).

In the kernel a program holds a block of keys, and multiplies it with the heads of one query after
another, up to 16 queries of a sequence; then it takes another block. Blocks after the last position
that the queries see are neither read nor written, so the work follows the contexts, however wide
the page tables are.

Bound on an H100, with 64 heads: by the sum over heads, which takes ordinary units about as long as
the product takes matrix units in FP8; for one query by the keys' bytes.
"""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton
from dsv3_kernels.attention.paging import PageTables
from dsv3_kernels.fp8_format import FP8
from dsv3_kernels.gemm._e4m3 import e4m3_operand, e4m3_view, is_native
from dsv3_kernels.index.index_cache import IndexCache
from dsv3_kernels.operation import operation

# Products in memory at a time in the reference: 4 MiB of float32, which fit a processor's cache.
_PRODUCTS = 1 << 20
# Keys per block; fewer in float32, which is multiplied without matrix units.
_KEYS = 128
_EXACT_KEYS = 32
# Queries that share a block of keys.
_MOST_QUERIES = 16
# Approximate programs per launch, four times those that a GPU runs at a time: a long sequence among
# short ones has as many as each of them.
_PROGRAMS = 4096


@triton.jit
def _operand(x, IS_FP8: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Return a loaded block as `tl.dot` takes it."""
    if IS_FP8:
        return e4m3_operand(x, NATIVE)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return x.to(DTYPE)


# Arguments that change from step to step; no variant is compiled for their values.
_VARY = (
    "weight_ptr",
    "page_ptr",
    "pos_ptr",
    "pages",
    "queries",
    "capacity",
    "shard",
)


@triton.jit(do_not_specialize=_VARY)
def _index_scores_kernel(
    q_ptr,
    weight_ptr,
    value_ptr,
    scale_ptr,
    page_ptr,
    pos_ptr,
    score_ptr,
    stride_page,
    stride_page_scale,
    pages,
    queries,
    capacity,
    shard,
    H: tl.constexpr,
    I: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    SHARDS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    IS_FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute the scores of QUERIES queries of a sequence, for some blocks of its keys."""
    in_turn()
    groups = tl.cdiv(queries, QUERIES)
    b = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * QUERIES
    some = first + tl.arange(0, QUERIES)
    pos = tl.load(pos_ptr + b * queries + some, mask=some < queries, other=-1).to(tl.int32)
    seen = (tl.max(pos, 0) + SHARDS - shard) // SHARDS
    h = tl.arange(0, HEADS)
    i = tl.arange(0, I)
    # Heads and keys beyond the last repeat it, without weight, and without a place to be stored.
    head = tl.minimum(h, H - 1)
    for start in range(tl.program_id(1) * KEYS, seen, tl.num_programs(1) * KEYS):
        at = start + tl.arange(0, KEYS)
        one = tl.minimum(at, seen - 1)
        page = tl.load(page_ptr + b * pages + one // PAGE).to(tl.int64)
        key_at = value_ptr + (page * stride_page + one % PAGE * I)[:, None] + i[None, :]
        key = _operand(tl.load(key_at), IS_FP8, NATIVE, DTYPE)
        for q in range(first, min(first + QUERIES, queries)):
            row = b * queries + q
            query_at = q_ptr + (row * H + head)[:, None] * I + i[None, :]
            query = _operand(tl.load(query_at), IS_FP8, NATIVE, DTYPE)
            product = tl.dot(key, tl.trans(query), input_precision="ieee")
            weight = tl.load(weight_ptr + row * H + h, mask=h < H, other=0.0)
            score = tl.sum(tl.maximum(product, 0.0) * weight[None, :], 1)
            if IS_FP8:
                score *= tl.load(scale_ptr + page * stride_page_scale + one % PAGE)
            query_pos = tl.load(pos_ptr + row).to(tl.int32)
            score = tl.where(at * SHARDS + shard <= query_pos, score, float("-inf"))
            tl.store(score_ptr + row * capacity + at, score, mask=at < seen)


def launch_index_scores(
    q_THI: Tensor,
    weight_TH: Tensor,
    cache: IndexCache,
    tables: PageTables,
    keys: int,
    programs: int,
) -> Tensor:
    """Launch `index_scores` by blocks of `keys` keys, with about `programs` programs."""
    B, Q = tables.query_pos_BQ.shape
    T, H, dim = q_THI.shape
    assert T == B * Q and q_THI.is_contiguous() and weight_TH.is_contiguous(), f"{q_THI.shape=}"
    assert dim == cache.dim and cache.is_fp8 == (q_THI.dtype == FP8), f"{q_THI.dtype=} {cache.dim=}"
    assert cache.slots.is_contiguous(), f"{cache.slots.stride()=}"
    assert cache.slots_per_page == tables.paging.slots_per_page, f"{cache.slots_per_page=}"
    tables = tables.contiguous()
    values, scales = cache.views()
    score_TS = weight_TH.new_empty(T, tables.capacity)
    queries = min(_MOST_QUERIES, next_power_of_2(Q))
    sequences = B * cdiv(Q, queries)
    is_exact = torch.float32 in (q_THI.dtype, values.dtype) or is_interpreted(q_THI)
    if T and tables.capacity:
        blocks = cdiv(tables.capacity, keys)
        _index_scores_kernel[(sequences, max(1, min(blocks, programs // sequences)))](
            q_ptr=e4m3_view(q_THI) if cache.is_fp8 else q_THI,
            weight_ptr=weight_TH,
            value_ptr=e4m3_view(values.view(FP8)) if cache.is_fp8 else values,
            scale_ptr=scales,
            page_ptr=tables.page_BG,
            pos_ptr=tables.query_pos_BQ,
            score_ptr=score_TS,
            stride_page=values.stride(0),
            stride_page_scale=scales.stride(0),
            pages=tables.page_BG.shape[1],
            queries=Q,
            capacity=tables.capacity,
            shard=tables.paging.shard,
            H=H,
            I=dim,
            HEADS=max(16, next_power_of_2(H)),
            PAGE=tables.paging.slots_per_page,
            SHARDS=tables.paging.shards,
            QUERIES=queries,
            KEYS=keys,
            IS_FP8=cache.is_fp8,
            NATIVE=is_native(q_THI),
            DTYPE=tl.float32 if is_exact else tl.bfloat16,
            num_warps=4 if H <= 64 else 8,
            num_stages=3,
            **launch_options(),
        )
    return score_TS


def _launch_index_scores(
    q_THI: Tensor, weight_TH: Tensor, cache: IndexCache, tables: PageTables
) -> Tensor:
    is_exact = torch.float32 in (q_THI.dtype, cache.slots.dtype)
    keys = _EXACT_KEYS if is_exact else _KEYS
    return launch_index_scores(q_THI, weight_TH, cache, tables, keys, _PROGRAMS)


@operation(kernel=_launch_index_scores)
def index_scores(q_THI: Tensor, weight_TH: Tensor, cache: IndexCache, tables: PageTables) -> Tensor:
    """Return the scores of all positions of the page tables that this rank stores.

    Args:
        q_THI: [B * Q, H, I] from `index_queries`.
        weight_TH: [B * Q, H] float32 from `index_queries`.
        cache: the index keys; FP8 if the queries are.
        tables: of the B sequences.

    Returns:
        [B * Q, tables.capacity] float32, in order of position. Scores of positions that a query
        does not see are undefined, and -inf in the reference.

    Source: DeepSeek-V3.2 report, eq. 1.
    """
    B, Q = tables.query_pos_BQ.shape
    _, H, dim = q_THI.shape
    paging = tables.paging
    capacity = tables.capacity
    key_pos_S = torch.arange(capacity, device=q_THI.device) * paging.shards + paging.shard
    q_BYI = q_THI.float().view(B, Q * H, dim)
    weight_BQH = weight_TH.view(B, Q, 1, H)
    score_BQS = weight_TH.new_full((B, Q, capacity), float("-inf"))
    step = max(1, _PRODUCTS // (Q * H * paging.slots_per_page)) * paging.slots_per_page
    for page_G, pos_Q, q_YI, weight_Q1H, score_QS in zip(
        tables.page_BG.long(), tables.query_pos_BQ, q_BYI, weight_BQH, score_BQS, strict=True
    ):
        seen_by_all, seen = (paging.local_len(int(pos) + 1) for pos in torch.aminmax(pos_Q))
        for s in range(0, seen, step):
            stop = min(s + step, seen)
            pages = slice(s // paging.slots_per_page, cdiv(stop, paging.slots_per_page))
            key_SI = cache.read_pages(page_G[pages])[: stop - s]
            product_QHS = (q_YI @ key_SI.T).relu_().view(Q, H, -1)
            torch.matmul(weight_Q1H, product_QHS, out=score_QS[:, s:stop].unsqueeze(1))
        some_QS = score_QS[:, seen_by_all:seen]
        some_QS.masked_fill_(key_pos_S[seen_by_all:seen] > pos_Q[:, None], float("-inf"))
    return score_BQS.flatten(0, 1)
