"""Decode attention over expanded keys and values (the naive cache). Bound by cache bytes."""

import math

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention._decode_tiles import numbered_at_once, pool_for, programs_for
from dsv3_kernels.attention._numbered_parts import count_parts, find_part, split_length
from dsv3_kernels.attention.merge_lse import log_sum_exp, merge_splits, softmax
from dsv3_kernels.attention.paging import PageTables
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.operation import operation

# Values in memory at a time in the reference: 64 MiB of float32.
_SCORES = 1 << 24
# Positions per split of the kernel, and per step.
_SPLIT = 512
_KEYS = 32


@triton.jit(
    do_not_specialize=[
        "page_ptr",
        "pos_ptr",
        "first_ptr",
        "pages",
        "sequences",
        "spare",
        "shard",
    ]
)
def _mha_decode_kernel(
    q_ptr,
    cache_ptr,
    page_ptr,
    pos_ptr,
    o_ptr,
    lse_ptr,
    first_ptr,
    stride_slot,
    pages,
    sequences,
    shortest,  # positions of the shortest split, a multiple of KEYS and 16
    spare,  # see `Pool`
    shard,
    scale_log2,
    H: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    X_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    SHARDS: tl.constexpr,
    KEYS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Compute some parts, for a head."""
    in_turn()
    head = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, X_PAD)
    v = tl.arange(0, V_PAD)
    is_x = x < X
    is_v = v < V
    split_len = split_length(shortest, spare, sequences, pos_ptr, 1, shard, SHARDS, AT_ONCE)
    num_parts = count_parts(sequences, split_len, pos_ptr, 1, shard, SHARDS, AT_ONCE)
    tl.store(first_ptr + sequences, num_parts)
    for part in range(tl.program_id(1), num_parts, tl.num_programs(1)):
        b, number = find_part(part, sequences, split_len, pos_ptr, 1, shard, SHARDS, AT_ONCE)
        tl.store(first_ptr + b, number)
        b = b.to(tl.int64)
        seen = (tl.load(pos_ptr + b).to(tl.int32) + SHARDS - shard) // SHARDS
        q = tl.load(q_ptr + (b * H + head) * X + x, mask=is_x, other=0.0).to(tl.float32)
        first = (part - number) * split_len
        top = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((V_PAD,), tl.float32)
        for start in range(first, min(first + split_len, seen), KEYS):
            at = start + tl.arange(0, KEYS)
            held = at < seen
            page = tl.load(page_ptr + b * pages + at // PAGE, mask=held, other=0).to(tl.int64)
            entry = ((page * PAGE + at % PAGE) * stride_slot + head * (X + V))[:, None]
            k_mask = held[:, None] & is_x[None, :]
            v_mask = held[:, None] & is_v[None, :]
            k = tl.load(cache_ptr + entry + x[None, :], mask=k_mask, other=0.0)
            value = tl.load(cache_ptr + entry + X + v[None, :], mask=v_mask, other=0.0)
            score = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale_log2
            score = tl.where(held, score, float("-inf"))
            best = tl.maximum(top, tl.max(score, 0))  # finite: the first key is always seen
            p = tl.exp2(score - best)
            decay = tl.exp2(top - best)
            total = total * decay + tl.sum(p, 0)
            acc = acc * decay + tl.sum(p[:, None] * value.to(tl.float32), 0)
            top = best
        divisor = tl.where(total == 0.0, 1.0, total)
        out = part * H + head
        tl.store(o_ptr + out * V + v, acc / divisor, mask=is_v)
        tl.store(lse_ptr + out + tl.arange(0, 1), log_sum_exp(top, divisor))


def launch_mha_decode(
    q_BHX: Tensor, cache_SY: Tensor, tables: PageTables, scale: float, split: int
) -> Tensor:
    """Launch programs for each head and part; merge the parts.

    Splits of bfloat16 become longer if the parts of all sequences take too much memory; otherwise
    groups of sequences are launched in turn.
    """
    B, H, X = q_BHX.shape
    V = cache_SY.shape[1] // H - X
    assert cache_SY.stride(1) == 1, f"{cache_SY.stride()=}"
    if not B:
        return torch.empty(B, H, V, dtype=torch.float32, device=q_BHX.device)
    splits = cdiv(tables.capacity, split)
    pool = pool_for(B, splits, H * V, torch.float32 in (q_BHX.dtype, cache_SY.dtype))
    if splits > 1 and pool.sequences < B:
        groups = []
        for b in range(0, B, pool.sequences):
            stop = b + pool.sequences
            some = tables.sequences(b, stop)
            groups.append(launch_mha_decode(q_BHX[b:stop], cache_SY, some, scale, split))
        return torch.cat(groups)
    q_BHX = q_BHX.contiguous()
    tables = tables.contiguous()
    num_parts = B if splits == 1 else pool.parts
    o = torch.empty(1, num_parts, H, V, dtype=torch.float32, device=q_BHX.device)
    lse = o.new_empty(1, num_parts, H)
    first_B = torch.empty(B + 1, dtype=torch.int32, device=q_BHX.device)
    _mha_decode_kernel[(H, programs_for(num_parts, H, B))](
        q_ptr=q_BHX,
        cache_ptr=cache_SY,
        page_ptr=tables.page_BG,
        pos_ptr=tables.query_pos_BQ,
        o_ptr=o,
        lse_ptr=lse,
        first_ptr=first_B,
        stride_slot=cache_SY.stride(0),
        pages=tables.page_BG.shape[1],
        sequences=B,
        shortest=split,
        spare=0 if splits == 1 else pool.spare,
        shard=tables.paging.shard,
        scale_log2=scale * math.log2(math.e),
        H=H,
        X=X,
        V=V,
        X_PAD=next_power_of_2(X),
        V_PAD=next_power_of_2(V),
        PAGE=tables.paging.slots_per_page,
        SHARDS=tables.paging.shards,
        KEYS=_KEYS,
        AT_ONCE=numbered_at_once(B),
        num_warps=4,
        num_stages=2,
        **launch_options(),
    )
    if splits == 1:
        return o[0]
    out = PartialOutputs(o.new_empty(1, B, H, V), lse.new_empty(1, B, H))
    merge_splits(PartialOutputs(o, lse), first_B, 1, out)
    return out.o[0]


def _launch_mha_decode(q_BHX: Tensor, cache_SY: Tensor, tables: PageTables, scale: float) -> Tensor:
    return launch_mha_decode(q_BHX, cache_SY, tables, scale, _SPLIT)


@operation(kernel=_launch_mha_decode)
def mha_decode(q_BHX: Tensor, cache_SY: Tensor, tables: PageTables, scale: float) -> Tensor:
    """Attend to cached expanded keys and values, one query token per sequence (naive form).

    Args:
        q_BHX: [B, H, N + R].
        cache_SY: [slots, H * (N + R + V)]: per head its key, then its value.
        tables: the keys of the queries, Q = 1.
        scale: multiplies the scores.

    Returns:
        [B, H, V] float32, 0 for a query without keys.
    """
    B, H, X = q_BHX.shape
    keys = tables.expanded()
    S = len(keys.key_pos_S)
    V = cache_SY.shape[1] // H - X
    out = torch.empty(B, H, V, dtype=torch.float32, device=q_BHX.device)
    step = max(1, _SCORES // max(1, S * cache_SY.shape[1]))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        some = keys.sequences(b, b + step)
        kv = cache_SY.index_select(0, some.slot_BS.flatten()).view(-1, S, H, X + V).float()
        score = torch.einsum("bhx,bshx->bhs", q_BHX[rows].float() * scale, kv[..., :X])
        if some.mask_BQS is not None:
            score.add_(some.mask_BQS)
        p = softmax(score, some.is_blind_BQ)
        out[rows] = torch.einsum("bhs,bshv->bhv", p, kv[..., X:])
    return out
