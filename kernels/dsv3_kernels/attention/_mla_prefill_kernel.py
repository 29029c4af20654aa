"""The kernel of `mla_prefill` and `mla_prefill_packed`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, is_hopper, is_interpreted, launch_options, tl, triton
from dsv3_kernels.attention.keys_values import KeysValues
from dsv3_kernels.attention.merge_lse import log_sum_exp
from dsv3_kernels.attention.parts import PartialOutputs


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
    """Attend to keys begin .. end - 1; WHOLE if every row sees all these keys."""
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        held = at < keys
        if WHOLE:
            mask_n = is_n[None, :]
            mask_r = is_r[None, :]
            mask_v = is_v[None, :]
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
    """Compute QUERIES of one sequence and head. The programs with most keys start first."""
    in_turn()
    head = tl.program_id(1).to(tl.int64)
    first = tl.zeros((1,), tl.int64)
    if PACKED:
        begin = tl.load(start_ptr + tl.program_id(2)).to(tl.int64)
        queries = (tl.load(start_ptr + tl.program_id(2) + 1) - begin).to(tl.int32)
        first = first + begin
        keys = queries
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if block * QUERIES < queries:
        row = block * QUERIES + tl.arange(0, QUERIES)
        n = tl.arange(0, N_PAD)
        r = tl.arange(0, R_PAD)
        v = tl.arange(0, V_PAD)
        is_n = n < N
        is_r = r < R
        is_v = v < V
        is_row = row < queries
        q_at = q_ptr + ((first + row) * stride_qt + head * stride_qh)[:, None]
        q_n = tl.load(q_at + n[None, :], mask=is_row[:, None] & is_n[None, :], other=0.0)
        q_r = tl.load(q_at + N + r[None, :], mask=is_row[:, None] & is_r[None, :], other=0.0)
        q_n = q_n.to(DTYPE)
        q_r = q_r.to(DTYPE)
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
            acc=acc,
            top=top,
            total=total,
            q_n=q_n,
            q_r=q_r,
            n_at=n_at,
            r_at=r_at,
            v_at=v_at,
            stride_n=stride_nt,
            stride_r=stride_rt,
            stride_v=stride_vt,
            begin=0,
            end=whole,
            keys=keys,
            last_key=row + ahead,
            is_n=is_n,
            is_r=is_r,
            is_v=is_v,
            scale_log2=scale_log2,
            KEYS=KEYS,
            WHOLE=True,
            DTYPE=DTYPE,
        )
        acc, top, total = _attend_blocks(
            acc=acc,
            top=top,
            total=total,
            q_n=q_n,
            q_r=q_r,
            n_at=n_at,
            r_at=r_at,
            v_at=v_at,
            stride_n=stride_nt,
            stride_r=stride_rt,
            stride_v=stride_vt,
            begin=whole,
            end=seen,
            keys=keys,
            last_key=row + ahead,
            is_n=is_n,
            is_r=is_r,
            is_v=is_v,
            scale_log2=scale_log2,
            KEYS=KEYS,
            WHOLE=False,
            DTYPE=DTYPE,
        )
        divisor = tl.where(total == 0.0, 1.0, total)
        out = (first + row) * H + head
        o_at = o_ptr + (out * V)[:, None] + v[None, :]
        tl.store(o_at, acc / divisor[:, None], mask=is_row[:, None] & is_v[None, :])
        tl.store(lse_ptr + out, log_sum_exp(top, divisor), mask=is_row)


@dataclass(frozen=True, slots=True)
class Tile:
    """The work of one program.

    Attributes:
        queries: per program.
        keys: per step.
        warps, stages: of the launch.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def tile_for(is_exact: bool, is_hopper: bool, width: int) -> Tile:
    """Return the best tile for `width` padded values of a head's key and value together.

    The largest take most of the shared memory. V3's heads have a width of 256, GLM's of 512.
    """
    is_wide = width > 256
    if is_exact:
        return Tile(queries=32, keys=16 if is_wide else 32, warps=8, stages=1)
    if is_hopper:
        return Tile(queries=128, keys=64 if is_wide else 128, warps=8, stages=2)
    return Tile(queries=64, keys=32, warps=8 if is_wide else 4, stages=2)


def launch_prefill(
    q: Tensor,
    keys: KeysValues,
    start_L: Tensor | None,
    longest: int,
    ahead: int,
    scale: float,
    tile: Tile | None,
) -> PartialOutputs:
    """Launch a program per block of queries, head and sequence.

    Args:
        q: [T, H, N + R].
        keys: of the sequence, or of the same tokens as the queries if there are several sequences.
        start_L: first row of each sequence, then T; None for one sequence.
        longest: queries of the longest sequence.
        ahead: positions from the first key to the first query.
        scale: multiplies the scores.
        tile: shape of the programs; None for the best one.
    """
    T, H, X = q.shape
    N = keys.k_SHN.shape[-1]
    R = X - N
    V = keys.v_SHV.shape[-1]
    for t in (keys.k_SHN, keys.k_SHR, keys.v_SHV):
        assert t.shape[1] == H, f"{t.shape=} {H=}"
        assert t.stride(-1) == q.stride(-1) == 1, "last dimensions must be dense"
    is_exact = q.dtype == torch.float32 or is_interpreted(q)
    width = next_power_of_2(N) + next_power_of_2(V)
    tile = tile or tile_for(is_exact, is_hopper(q), width)
    o = torch.empty(T, H, V, dtype=torch.float32, device=q.device)
    lse = o.new_empty(T, H)
    sequences = 1 if start_L is None else len(start_L) - 1
    if T:
        _mla_prefill_kernel[(cdiv(longest, tile.queries), H, sequences)](
            q_ptr=q,
            n_ptr=keys.k_SHN,
            r_ptr=keys.k_SHR,
            v_ptr=keys.v_SHV,
            start_ptr=lse if start_L is None else start_L,
            o_ptr=o,
            lse_ptr=lse,
            queries=T,
            keys=len(keys.k_SHN),
            ahead=ahead,
            stride_qt=q.stride(0),
            stride_qh=q.stride(1),
            stride_nt=keys.k_SHN.stride(0),
            stride_nh=keys.k_SHN.stride(1),
            stride_rt=keys.k_SHR.stride(0),
            stride_rh=keys.k_SHR.stride(1),
            stride_vt=keys.v_SHV.stride(0),
            stride_vh=keys.v_SHV.stride(1),
            scale_log2=scale * math.log2(math.e),
            H=H,
            N=N,
            R=R,
            V=V,
            N_PAD=max(16, next_power_of_2(N)),
            R_PAD=max(16, next_power_of_2(R)),
            V_PAD=max(16, next_power_of_2(V)),
            QUERIES=tile.queries,
            KEYS=tile.keys,
            PACKED=start_L is not None,
            DTYPE=tl.float32 if is_exact else tl.bfloat16,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **launch_options(),
        )
    return PartialOutputs(o, lse)
