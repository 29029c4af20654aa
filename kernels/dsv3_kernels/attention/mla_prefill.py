"""MLA in its expanded form: every head has its own keys and values. Bound by FLOPs.

A key is in two parts, as it comes: what the head expanded, and the rotated part that all heads may
share; so nothing needs to be copied together.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels._triton import (
    in_turn,
    is_hopper,
    is_interpreted,
    launch_options,
    tl,
    triton,
    use_triton,
)
from dsv3_kernels.attention.merge_lse import softmax_lse

# Scores held at a time by the reference: 1 MiB of float32, which a processor's cache holds.
_SCORES = 1 << 18


def mla_prefill_ref(
    q_QHX: Tensor,
    k_SHN: Tensor,
    k_SHR: Tensor,
    v_SHV: Tensor,
    first_key: int,
    first_query: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Define `mla_prefill`."""
    k_SHX = torch.cat((k_SHN, k_SHR), -1)
    q, k, v = (t.float().transpose(0, 1) for t in (q_QHX, k_SHX, v_SHV))
    (H, Q), S = q.shape[:2], k.shape[1]
    pos = torch.arange(max(first_key + S, first_query + Q), device=q.device)
    out, lse = q.new_empty(Q, H, v.shape[-1]), q.new_empty(Q, H)
    step = max(1, _SCORES // (H * max(S, 1)))
    for i in range(0, Q, step):
        rows = slice(i, min(i + step, Q))
        # No query of these sees a key after them.
        seen = max(1, min(S, first_query + rows.stop - first_key))
        score = torch.matmul(q[:, rows] * scale, k[:, :seen].transpose(1, 2))
        if first_key + seen - 1 > first_query + i:
            key_pos, query_pos = pos[first_key:][:seen], pos[first_query:][rows]
            score.masked_fill_(key_pos > query_pos[:, None], float("-inf"))
        p, part = softmax_lse(score)
        out[rows] = torch.matmul(p, v[:, :seen]).transpose(0, 1)
        lse[rows] = part.transpose(0, 1)
    return out, lse


def mla_prefill_packed_ref(
    q_THX: Tensor, k_THN: Tensor, k_THR: Tensor, v_THV: Tensor, start_L: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Define `mla_prefill_packed`."""
    parts = [
        mla_prefill_ref(q_THX[a:b], k_THN[a:b], k_THR[a:b], v_THV[a:b], 0, 0, scale)
        for a, b in pairwise(start_L.tolist())
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


@triton.jit
def _attend_blocks(
    acc,
    top,
    total,
    q_n,
    q_r,
    n_at,
    r_at,
    v_at,
    stride_n,
    stride_r,
    stride_v,
    begin,
    end,
    keys,
    last_key,
    is_n,
    is_r,
    is_v,
    scale_log2,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Attend to keys begin .. end - 1; WHOLE if every row sees all of them."""
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        held = at < keys
        if WHOLE:
            mask_n, mask_r, mask_v = is_n[None, :], is_r[None, :], is_v[None, :]
        else:
            mask_n = held[:, None] & is_n[None, :]
            mask_r = held[:, None] & is_r[None, :]
            mask_v = held[:, None] & is_v[None, :]
        step = at.to(tl.int64)[:, None]
        k_n = tl.load(n_at + step * stride_n, mask=mask_n, other=0.0).to(DTYPE)
        k_r = tl.load(r_at + step * stride_r, mask=mask_r, other=0.0).to(DTYPE)
        v = tl.load(v_at + step * stride_v, mask=mask_v, other=0.0).to(DTYPE)
        score = tl.dot(q_n, tl.trans(k_n), input_precision="ieee")
        score = tl.dot(q_r, tl.trans(k_r), score, input_precision="ieee") * scale_log2
        if not WHOLE:
            is_seen = held[None, :] & (at[None, :] <= last_key[:, None])
            score = tl.where(is_seen, score, float("-inf"))
        best = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(best == float("-inf"), 0.0, best)
        p = tl.exp2(score - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(DTYPE), v, acc * decay[:, None], input_precision="ieee")
        top = best
    return acc, top, total


@triton.jit(do_not_specialize=["queries", "keys", "ahead"])
def _mla_prefill_kernel(
    q_ptr,
    n_ptr,
    r_ptr,
    v_ptr,
    start_ptr,
    o_ptr,
    lse_ptr,
    queries,
    keys,
    ahead,  # positions from the first key to the first query
    stride_qt,
    stride_qh,
    stride_nt,
    stride_nh,
    stride_rt,
    stride_rh,
    stride_vt,
    stride_vh,
    scale_log2,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    N_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: QUERIES of one sequence, one head. The longest programs start first."""
    in_turn()
    head = tl.program_id(1).to(tl.int64)
    first = tl.zeros((1,), tl.int64)
    if PACKED:
        begin = tl.load(start_ptr + tl.program_id(2)).to(tl.int64)
        queries = (tl.load(start_ptr + tl.program_id(2) + 1) - begin).to(tl.int32)
        first, keys = first + begin, queries
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if block * QUERIES < queries:
        row = block * QUERIES + tl.arange(0, QUERIES)
        n, r, v = tl.arange(0, N_PAD), tl.arange(0, R_PAD), tl.arange(0, V_PAD)
        is_n, is_r, is_v, is_row = n < N, r < R, v < V, row < queries
        q_at = q_ptr + ((first + row) * stride_qt + head * stride_qh)[:, None]
        q_n = tl.load(q_at + n[None, :], mask=is_row[:, None] & is_n[None, :], other=0.0)
        q_r = tl.load(q_at + N + r[None, :], mask=is_row[:, None] & is_r[None, :], other=0.0)
        q_n, q_r = q_n.to(DTYPE), q_r.to(DTYPE)
        n_at = n_ptr + (first * stride_nt + head * stride_nh + n)[None, :]
        r_at = r_ptr + (first * stride_rt + head * stride_rh + r)[None, :]
        v_at = v_ptr + (first * stride_vt + head * stride_vh + v)[None, :]
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, V_PAD), tl.float32)
        seen = tl.maximum(0, tl.minimum(keys, block * QUERIES + QUERIES + ahead))
        # Up to here all rows see all keys.
        whole = tl.maximum(0, tl.minimum(keys, block * QUERIES + ahead + 1)) // KEYS * KEYS
        acc, top, total = _attend_blocks(
            acc, top, total, q_n, q_r, n_at, r_at, v_at, stride_nt, stride_rt, stride_vt,
            0, whole, keys, row + ahead, is_n, is_r, is_v, scale_log2, KEYS, True, DTYPE,
        )  # fmt: skip
        acc, top, total = _attend_blocks(
            acc, top, total, q_n, q_r, n_at, r_at, v_at, stride_nt, stride_rt, stride_vt,
            whole, seen, keys, row + ahead, is_n, is_r, is_v, scale_log2, KEYS, False, DTYPE,
        )  # fmt: skip
        divisor = tl.where(total == 0.0, 1.0, total)
        out = (first + row) * H + head
        o_at = o_ptr + (out * V)[:, None] + v[None, :]
        tl.store(o_at, acc / divisor[:, None], mask=is_row[:, None] & is_v[None, :])
        tl.store(lse_ptr + out, (top + tl.log2(divisor)) * 0.6931471805599453, mask=is_row)


class Tile(NamedTuple):
    """Queries of a program, keys at a time, warps and stages of the launch."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile_for(is_exact: bool, is_hopper: bool) -> Tile:
    """Return the tile; the largest takes most of a Hopper's shared memory."""
    if is_exact:
        return Tile(32, 32, 8, 1)
    return Tile(128, 128, 8, 2) if is_hopper else Tile(64, 32, 4, 2)


def _launch(
    q: Tensor,
    k_n: Tensor,
    k_r: Tensor,
    v: Tensor,
    start_L: Tensor | None,
    longest: int,
    ahead: int,
    scale: float,
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    (T, H, X), N, V = q.shape, k_n.shape[-1], v.shape[-1]
    assert k_n.shape[1] == k_r.shape[1] == v.shape[1] == H, f"{k_n.shape=} {k_r.shape=} {v.shape=}"
    assert all(t.stride(-1) == 1 for t in (q, k_n, k_r, v)), "last dimensions must be dense"
    is_exact = q.dtype == torch.float32 or is_interpreted(q)
    tile = tile or tile_for(is_exact, is_hopper(q))
    o = torch.empty(T, H, V, dtype=torch.float32, device=q.device)
    lse = o.new_empty(T, H)
    sequences = 1 if start_L is None else len(start_L) - 1
    strides = (t.stride(i) for t in (q, k_n, k_r, v) for i in (0, 1))
    dims = N, X - N, V
    if T:
        _mla_prefill_kernel[(triton.cdiv(longest, tile.queries), H, sequences)](
            *(q, k_n, k_r, v, lse if start_L is None else start_L, o, lse),
            *(T, len(k_n), ahead, *strides, scale * math.log2(math.e), H, *dims),
            *(max(16, triton.next_power_of_2(dim)) for dim in dims),
            *(tile.queries, tile.keys, start_L is not None),
            tl.float32 if is_exact else tl.bfloat16,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **launch_options(),
        )
    return o, lse


def mla_prefill_triton(
    q_QHX: Tensor,
    k_SHN: Tensor,
    k_SHR: Tensor,
    v_SHV: Tensor,
    first_key: int,
    first_query: int,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch a program per block of queries and head."""
    ahead = first_query - first_key
    return _launch(q_QHX, k_SHN, k_SHR, v_SHV, None, len(q_QHX), ahead, scale, tile)


def mla_prefill_packed_triton(
    q_THX: Tensor,
    k_THN: Tensor,
    k_THR: Tensor,
    v_THV: Tensor,
    start_L: Tensor,
    longest: int,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch a program per block of queries, head and sequence."""
    return _launch(q_THX, k_THN, k_THR, v_THV, start_L, longest, 0, scale, tile)


def mla_prefill(
    q_QHX: Tensor,
    k_SHN: Tensor,
    k_SHR: Tensor,
    v_SHV: Tensor,
    first_key: int,
    first_query: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend causally, one sequence, every head with its own keys (the expanded form).

    Args:
        q_QHX: [Q, H, N + R] queries at positions first_query, first_query + 1, ...
        k_SHN: [S, H, N] keys at positions first_key, first_key + 1, ...: their expanded part.
        k_SHR: [S, H, R] their rotated part; a view that repeats one head's will do.
        v_SHV: [S, H, V].
        first_key: position of the first key.
        first_query: position of the first query.
        scale: multiplies the scores.

    Returns:
        o_QHV: [Q, H, V] float32.
        lse_QH: [Q, H] float32; -inf where a query sees no key.
    """
    args = q_QHX, k_SHN, k_SHR, v_SHV, first_key, first_query, scale
    return mla_prefill_triton(*args) if use_triton(q_QHX) else mla_prefill_ref(*args)


def mla_prefill_packed(
    q_THX: Tensor,
    k_THN: Tensor,
    k_THR: Tensor,
    v_THV: Tensor,
    start_L: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend causally within each of several sequences that lie one behind the other.

    Args:
        q_THX: [T, H, N + R].
        k_THN: [T, H, N] the same tokens' keys, in two parts as for `mla_prefill`.
        k_THR: [T, H, R].
        v_THV: [T, H, V].
        start_L: [L + 1] int32 first row of each sequence, then T.
        longest: rows of the longest one, on the host.
        scale: multiplies the scores.

    Returns:
        o_THV: [T, H, V] float32.
        lse_TH: [T, H] float32.
    """
    tensors = q_THX, k_THN, k_THR, v_THV
    if use_triton(q_THX):
        return mla_prefill_packed_triton(*tensors, start_L, longest, scale)
    return mla_prefill_packed_ref(*tensors, start_L, scale)
