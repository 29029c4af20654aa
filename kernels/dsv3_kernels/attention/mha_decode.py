"""Decode attention over expanded keys and values (the naive cache). Bound by cache bytes."""

import math

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.attention._decode_tiles import programs_for, sequences_for
from dsv3_kernels.attention.merge_lse import merge_splits_triton, softmax_lse
from dsv3_kernels.attention.paging import Keys, Paging

# Values held at a time by the reference: 64 MiB of float32.
_SCORES = 1 << 24
# Positions of a program of the kernel, and at a time.
_SPLIT, _KEYS = 512, 32


def mha_decode_ref(
    q_BHX: Tensor,
    cache_SY: Tensor,
    page_BG: Tensor,
    query_pos_B: Tensor,
    paging: Paging,
    scale: float,
    keys: Keys | None = None,
) -> Tensor:
    """Define `mha_decode`."""
    B, H, X = q_BHX.shape
    keys = keys or paging.keys(page_BG, query_pos_B[:, None])
    slot_BS = keys.slot_BS
    S = slot_BS.shape[1]
    V = cache_SY.shape[1] // H - X
    out = torch.empty(B, H, V, dtype=torch.float32, device=q_BHX.device)
    step = max(1, _SCORES // max(1, S * cache_SY.shape[1]))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        kv = cache_SY.index_select(0, slot_BS[rows].flatten()).view(-1, S, H, X + V).float()
        score = torch.einsum("bhx,bshx->bhs", q_BHX[rows].float() * scale, kv[..., :X])
        hidden = keys.key_pos_S > query_pos_B[rows, None]
        p, _ = softmax_lse(score.masked_fill_(hidden.unsqueeze(1), float("-inf")))
        out[rows] = torch.einsum("bhs,bshv->bhv", p, kv[..., X:])
    return out


@triton.jit(
    do_not_specialize=["page_ptr", "pos_ptr", "pages", "o_stride_split", "lse_stride_split"]
)
def _mha_decode_kernel(
    q_ptr,
    cache_ptr,
    page_ptr,
    pos_ptr,
    o_ptr,
    lse_ptr,
    stride_slot,
    pages,
    o_stride_split,
    lse_stride_split,
    scale_log2,
    H: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    X_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    SHARDS: tl.constexpr,
    SHARD: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: a head of a sequence and some splits of the positions held here."""
    in_turn()
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    seen = (tl.load(pos_ptr + b).to(tl.int32) + SHARDS - SHARD) // SHARDS
    needed = tl.maximum(1, tl.cdiv(seen, SPLIT))
    if tl.program_id(1) < needed:
        x, v = tl.arange(0, X_PAD), tl.arange(0, V_PAD)
        is_x, is_v = x < X, v < V
        q = tl.load(q_ptr + (b * H + head) * X + x, mask=is_x, other=0.0).to(tl.float32)
        for split in range(tl.program_id(1), needed, tl.num_programs(1)):
            first = split * SPLIT
            top = tl.full((1,), float("-inf"), tl.float32)
            total, acc = tl.zeros((1,), tl.float32), tl.zeros((V_PAD,), tl.float32)
            for start in range(first, min(first + SPLIT, seen), KEYS):
                at = start + tl.arange(0, KEYS)
                held = at < seen
                page = tl.load(page_ptr + b * pages + at // PAGE, mask=held, other=0).to(tl.int64)
                entry = ((page * PAGE + at % PAGE) * stride_slot + head * (X + V))[:, None]
                k_mask, v_mask = held[:, None] & is_x[None, :], held[:, None] & is_v[None, :]
                k = tl.load(cache_ptr + entry + x[None, :], mask=k_mask, other=0.0)
                value = tl.load(cache_ptr + entry + X + v[None, :], mask=v_mask, other=0.0)
                score = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale_log2
                score = tl.where(held, score, float("-inf"))
                best = tl.maximum(top, tl.max(score, 0))  # finite: the first key is always seen
                p, decay = tl.exp2(score - best), tl.exp2(top - best)
                total = total * decay + tl.sum(p, 0)
                acc = acc * decay + tl.sum(p[:, None] * value.to(tl.float32), 0)
                top = best
            divisor = tl.where(total == 0.0, 1.0, total)
            out = b * H + head
            o_at = o_ptr + split * o_stride_split.to(tl.int64) + out * V
            tl.store(o_at + v, acc / divisor, mask=is_v)
            lse = (top + tl.log2(divisor)) * 0.6931471805599453
            tl.store(lse_ptr + split * lse_stride_split + out + tl.arange(0, 1), lse)


def mha_decode_triton(
    q_BHX: Tensor,
    cache_SY: Tensor,
    page_BG: Tensor,
    query_pos_B: Tensor,
    paging: Paging,
    scale: float,
    split: int = _SPLIT,
) -> Tensor:
    """Launch a program per head, split and sequence; merge the splits."""
    (B, H, X), G = q_BHX.shape, page_BG.shape[1]
    V = cache_SY.shape[1] // H - X
    assert cache_SY.stride(1) == 1, f"{cache_SY.stride()=}"
    q_BHX, page_BG, query_pos_B = (t.contiguous() for t in (q_BHX, page_BG, query_pos_B))
    splits = triton.cdiv(G * paging.slots_per_page, split)
    if (step := sequences_for(splits, H * V)) < B and splits > 1:
        some = zip(*(x.split(step) for x in (q_BHX, page_BG, query_pos_B)), strict=True)
        rest = paging, scale, split
        return torch.cat([mha_decode_triton(q, cache_SY, page, p, *rest) for q, page, p in some])
    o = torch.empty(splits, 1, B, H, V, dtype=torch.float32, device=q_BHX.device)
    lse = o.new_empty(splits, 1, B, H)
    if not B:
        return o[0, 0]
    _mha_decode_kernel[(H, programs_for(splits, H * B), B)](
        *(q_BHX, cache_SY, page_BG, query_pos_B, o, lse, cache_SY.stride(0), G),
        *(o.stride(0), lse.stride(0), scale * math.log2(math.e), H, X, V),
        *(triton.next_power_of_2(X), triton.next_power_of_2(V)),
        *(paging.slots_per_page, paging.shards, paging.shard, _KEYS, split),
        num_warps=4,
        num_stages=2,
        **launch_options(),
    )
    if splits == 1:
        return o[0, 0]
    out, out_lse = torch.empty_like(o[0]), torch.empty_like(lse[0])
    merge_splits_triton((o, lse), query_pos_B[:, None], paging, split, (out, out_lse))
    return out[0]


def mha_decode(
    q_BHX: Tensor,
    cache_SY: Tensor,
    page_BG: Tensor,
    query_pos_B: Tensor,
    paging: Paging,
    scale: float,
    keys: Keys | None = None,
) -> Tensor:
    """Attend to cached expanded keys and values, one query token per sequence (naive form).

    Args:
        q_BHX: [B, H, N + R].
        cache_SY: [slots, H * (N + R + V)]: per head its key, then its value.
        page_BG: [B, G] int32 pages of each sequence, filled up with page 0.
        query_pos_B: [B] int64 positions; a query sees keys up to its own, so none at -1.
        paging: which of the positions this rank holds, and where.
        scale: multiplies the scores.
        keys: `paging.keys` of these tables, if the caller has them already.

    Returns:
        [B, H, V] float32, 0 where a query sees no key.
    """
    args = q_BHX, cache_SY, page_BG, query_pos_B, paging, scale
    return mha_decode_triton(*args) if use_triton(q_BHX) else mha_decode_ref(*args, keys)
