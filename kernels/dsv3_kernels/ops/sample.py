"""Sampling by counter-based Gumbel noise: the same logits, parameters and seed give the same token.

Token = argmax over the kept vocabulary of logit / temperature + g(seed, answer, position, id). The
Gumbel noise g is computed from a counter, not drawn from a stream. So the choice does not depend on
the batch, the world size or earlier samples, and no two answers to one seed, nor answers to two
seeds, share their noise. Ties go to the lowest id.

In the kernel one program samples one row. It reads the row twice (from L2), and twice more for each
of top-k and top-p: a first pass finds a bound on the cut, a second one copies the few tokens beyond
it, and the cut is found among them four bits of a float at a time, without sorting. (Rows so flat
that these tokens are many are read eight times instead.) Min-p is a floor under the scaled logits,
compared as they are read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.operation import operation
from dsv3_kernels.ops.philox import gumbel, uniform_block

# Logits that a program of the kernel reads at a time.
_BLOCK = 4096
# Likeliest tokens of a row that are copied to find the cut; more are selected in the row itself.
_NEAR = 8192


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters of the rows of `sample`.

    Attributes:
        temperature_B: [B] float32; 0 is greedy.
        top_k_B: [B] int64; 0 keeps all.
        top_p_B: [B] float32 in (0, 1].
        min_p_B: [B] float32 in [0, 1]: drops tokens whose probability is below this share of the
            largest probability.
        seed_B: [B] int64, the request's seed.
        answer_B: [B] int64 in [0, 2^31), index of the answer among those to one prompt and seed.
        position_B: [B] int64, position of the token to be chosen.
    """

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    answer_B: Tensor
    position_B: Tensor


def _keep_likeliest(logits_BW: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Set the logits that top-k, then top-p, drop to -inf. Of equal logits the lowest ids stay."""
    order = logits_BW.sort(dim=-1, descending=True, stable=True)
    rank_W = torch.arange(logits_BW.shape[1], device=logits_BW.device)
    limit_B = torch.where(top_k_B > 0, top_k_B, logits_BW.shape[1])
    ranked = order.values.masked_fill(rank_W >= limit_B[:, None], float("-inf"))
    p = ranked.softmax(-1)
    # A token stays while the likelier ones before it do not yet reach top_p; the first always,
    # and all of them at top_p = 1, which the rounded sum may reach early.
    reach_B = torch.where(top_p_B < 1, top_p_B, 2.0)
    ranked.masked_fill_((p.cumsum(-1) - p >= reach_B[:, None]) & (rank_W > 0), float("-inf"))
    return torch.empty_like(ranked).scatter_(1, order.indices, ranked)


@triton.jit
def _distance(row_ptr, ids, W, best, temperature, floor):
    """Return scaled logits, and integers that grow as they fall: 0 for the best.

    Scaled logits below `floor` become -inf.
    """
    x = tl.load(row_ptr + ids, mask=ids < W, other=float("-inf"))
    scaled = tl.div_rn(x - best, tl.broadcast_to(temperature, ids.shape))
    scaled = tl.where(scaled < floor, float("-inf"), scaled)
    return scaled, scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _before(scaled, distance, bound):
    """Return the number of tokens at smaller distances than each of 16 bounds, and their mass."""
    before = distance[:, None] < bound[None, :]
    mass = tl.where(before, tl.exp(scaled)[:, None], 0.0)
    return tl.sum(before.to(tl.int32), 0), tl.sum(mass, 0)


@triton.jit
def _select(
    row_ptr, W, best, temperature, floor, limit, reach, RAW: tl.constexpr, BLOCK: tl.constexpr
):
    """Do `_cut` in eight passes over a row, which find four bits of the distance each.

    The row holds logits (RAW) or scaled logits.
    """
    j = tl.arange(0, 16)
    cut = tl.zeros((1,), tl.int32)
    before_count = tl.zeros((16,), tl.int32)
    before_mass = tl.zeros((16,), tl.float32)
    chosen = j == 0
    for digit in range(8):  # the highest first; that one has three bits
        bound = cut + (j << (28 - 4 * digit))
        is_bound = bound >= cut
        before_count = tl.zeros((16,), tl.int32)
        before_mass = tl.zeros((16,), tl.float32)
        for start in range(0, W, BLOCK):
            at = start + tl.arange(0, BLOCK)
            if RAW:
                scaled, distance = _distance(row_ptr, at, W, best, temperature, floor)
            else:
                scaled = tl.load(row_ptr + at, mask=at < W, other=float("-inf"))
                distance = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            count, mass = _before(scaled, distance, bound)
            before_count += count
            before_mass += mass
        # Bounds grow, so those that fit come first.
        fits = is_bound & (before_count < limit) & (before_mass < reach)
        last = tl.sum(fits.to(tl.int32), 0) - 1
        chosen = j == last
        cut += last << (28 - 4 * digit)
    count = tl.sum(tl.where(chosen, before_count, 0), 0)
    mass = tl.sum(tl.where(chosen, before_mass, 0.0), 0)
    return tl.sum(cut, 0), count, mass


@triton.jit
def _cut(
    row_ptr,
    near_ptr,
    W,
    best,
    temperature,
    floor,
    limit,
    reach,
    NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the tokens of a row that may be kept, likeliest first, by their distances.

    One pass finds a distance that is not reached. If at most NEAR tokens are closer, a second pass
    copies them to `near_ptr`, where they are selected; otherwise they are selected in the row.

    Returns:
        The largest distance before which fewer than `limit` tokens lie, of less mass than `reach`;
        the number and the mass of these tokens.
    """
    j = tl.arange(0, 16)
    # 0.5, 1.25, 2.25, 3.5, 5 ... 33.75, then infinity.
    bound = tl.where(j < 15, (j + 1) * (j + 4) / 8.0, float("inf")).to(tl.int32, bitcast=True)
    before_count = tl.zeros((16,), tl.int32)
    before_mass = tl.zeros((16,), tl.float32)
    for start in range(0, W, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scaled, distance = _distance(row_ptr, ids, W, best, temperature, floor)
        count, mass = _before(scaled, distance, bound)
        before_count += count
        before_mass += mass
    is_short = (before_count < limit) & (before_mass < reach)
    first = tl.sum(is_short.to(tl.int32), 0)
    end = tl.sum(tl.where(j == first, bound, 0), 0)
    num_near = tl.sum(tl.where(j == first, before_count, 0), 0)
    if (first < 16) & (num_near <= NEAR):
        taken = num_near * 0
        for start in range(0, W, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            scaled, distance = _distance(row_ptr, ids, W, best, temperature, floor)
            is_near = (distance < end).to(tl.int32)
            at = taken + tl.cumsum(is_near, 0) - 1
            tl.store(near_ptr + at, scaled, mask=is_near > 0)
            taken += tl.sum(is_near, 0)
        tl.debug_barrier()  # all threads' stores come before the loads
        cut, count, mass = _select(
            near_ptr, num_near, best, temperature, floor, limit, reach, False, BLOCK
        )
        # Sums of another order may round to just below `reach`.
        cut = tl.minimum(cut, end)
    else:
        cut, count, mass = _select(row_ptr, W, best, temperature, floor, limit, reach, True, BLOCK)
    return cut, count, mass


@triton.jit
def _mass(row_ptr, W, best, temperature, floor, BLOCK: tl.constexpr):
    """Return the mass of a whole row."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, W, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scaled, _ = _distance(row_ptr, ids, W, best, temperature, floor)
        total += tl.exp(scaled)
    return tl.sum(total, 0)


@triton.jit
def _lowest_best(value, ids, W):
    """Return the lowest id of the greatest value."""
    at = tl.min(tl.where(value == tl.max(value, 0), ids, W), 0)
    return tl.minimum(at, W - 1)  # of NaN only, none is the greatest


# A rank's share of a step's rows may begin anywhere.
_VARY = (
    "temperature_ptr",
    "top_k_ptr",
    "top_p_ptr",
    "min_p_ptr",
    "seed_ptr",
    "answer_ptr",
    "position_ptr",
    "W",
)


@triton.jit(do_not_specialize=_VARY)
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    answer_ptr,
    position_ptr,
    near_ptr,  # NEAR values for each row
    out_ptr,
    stride,
    W,
    NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
    CUT_BLOCK: tl.constexpr,
):
    """Sample one row: find its best logit, then the cut, then the best kept logit with noise."""
    in_turn()
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * stride
    step = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = step
    for start in range(0, W, BLOCK):
        x = tl.load(row_ptr + start + step, mask=start + step < W, other=float("-inf"))
        where = tl.where(x > top, start + step, where)
        top = tl.maximum(top, x)
    best = tl.max(top, 0)
    chosen = _lowest_best(top, where, W)
    temperature = tl.load(temperature_ptr + b)
    if temperature > 0:
        top_k = tl.load(top_k_ptr + b).to(tl.int32)
        top_p = tl.load(top_p_ptr + b)
        min_p = tl.load(min_p_ptr + b)
        floor = tl.where(min_p > 0, tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
        # Kept: all tokens closer than `cut`, and the first `equals` at this distance.
        cut = tl.sum(tl.full((1,), 0x7FFFFFFF, tl.int32), 0)
        equals = cut
        total = tl.sum(tl.full((1,), float("inf"), tl.float32), 0)
        if (top_k > 0) & (top_k < W):
            cut, count, mass = _cut(
                row_ptr=row_ptr,
                near_ptr=near_ptr + b * NEAR,
                W=W,
                best=best,
                temperature=temperature,
                floor=floor,
                limit=top_k,
                reach=total,
                NEAR=NEAR,
                BLOCK=CUT_BLOCK,
            )
            equals = top_k - count
            total = mass + equals.to(tl.float32) * tl.exp(-cut.to(tl.float32, bitcast=True))
        if top_p < 1:
            if total == float("inf"):
                total = _mass(row_ptr, W, best, temperature, floor, BLOCK)
            reach = top_p * total
            nearer, _, mass = _cut(
                row_ptr=row_ptr,
                near_ptr=near_ptr + b * NEAR,
                W=W,
                best=best,
                temperature=temperature,
                floor=floor,
                limit=W + 1,
                reach=reach,
                NEAR=NEAR,
                BLOCK=CUT_BLOCK,
            )
            needed = (reach - mass) / tl.exp(-nearer.to(tl.float32, bitcast=True))
            some = tl.minimum(tl.ceil(needed), W.to(tl.float32)).to(tl.int32)
            some = tl.where(nearer == cut, tl.minimum(some, equals), some)
            equals = tl.where(nearer <= cut, some, equals)
            cut = tl.minimum(cut, nearer)
        seed = tl.load(seed_ptr + b)
        position = tl.load(position_ptr + b)
        answer = tl.load(answer_ptr + b)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        where = step
        taken = tl.sum(tl.zeros((1,), tl.int32), 0)
        for start in range(0, W, BLOCK):
            ids = start + step
            scaled, distance = _distance(row_ptr, ids, W, best, temperature, floor)
            is_equal = (distance == cut).to(tl.int32)
            is_kept = (distance < cut) | (
                (is_equal > 0) & (taken + tl.cumsum(is_equal, 0) <= equals)
            )
            taken += tl.sum(is_equal, 0)
            noise = -tl.log(-tl.log(uniform_block(seed, position, answer, start, BLOCK)))
            value = tl.where(is_kept & (ids < W), scaled + noise, float("-inf"))
            where = tl.where(value > top, ids, where)
            top = tl.maximum(top, value)
        chosen = _lowest_best(top, where, W)
    tl.store(out_ptr + b, chosen.to(tl.int64))


def launch_sample(logits_BW: Tensor, params: RowParams, block: int, near: int) -> Tensor:
    """Launch one program per row.

    Args:
        logits_BW: see `sample`.
        params: see `sample`.
        block: logits that a program reads at a time.
        near: see `_NEAR`.
    """
    B, W = logits_BW.shape
    assert logits_BW.stride(1) == 1 and logits_BW.dtype == torch.float32, f"{logits_BW.stride()=}"
    out = torch.empty(B, dtype=torch.int64, device=logits_BW.device)
    near_BN = logits_BW.new_empty(B, near)
    if B:
        _sample_kernel[(B,)](
            logits_ptr=logits_BW,
            temperature_ptr=params.temperature_B.contiguous(),
            top_k_ptr=params.top_k_B.contiguous(),
            top_p_ptr=params.top_p_B.contiguous(),
            min_p_ptr=params.min_p_B.contiguous(),
            seed_ptr=params.seed_B.contiguous(),
            answer_ptr=params.answer_B.contiguous(),
            position_ptr=params.position_B.contiguous(),
            near_ptr=near_BN,
            out_ptr=out,
            stride=logits_BW.stride(0),
            W=W,
            NEAR=near,
            BLOCK=block,
            CUT_BLOCK=block // 2,
            num_warps=16,
            **launch_options(),
        )
    return out


def _launch_sample(logits_BW: Tensor, params: RowParams) -> Tensor:
    return launch_sample(logits_BW, params, _BLOCK, _NEAR)


@operation(kernel=_launch_sample)
def sample(logits_BW: Tensor, params: RowParams) -> Tensor:
    """Choose one token per row: temperature first, then min-p, then top-k, then top-p.

    Args:
        logits_BW: [B, W] float32, whole vocabulary rows.
        params: how each row is sampled.

    Returns:
        [B] int64 token ids.

    Source: Gumbel-max trick (Gumbel 1954); counters as in `philox`.
    """
    chosen = logits_BW.argmax(-1)
    drawn = params.temperature_B > 0
    if not bool(drawn.any()):
        return chosen
    scaled = logits_BW[drawn]
    # The best one becomes 0, so that a tiny temperature cannot overflow it.
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / params.temperature_B[drawn, None]
    min_p = params.min_p_B[drawn]
    if bool((min_p > 0).any()):  # exp(scaled) is a token's probability over that of the best
        scaled = scaled.masked_fill(scaled < min_p.log()[:, None], float("-inf"))
    top_k = params.top_k_B[drawn]
    top_p = params.top_p_B[drawn]
    if bool(((top_k > 0) | (top_p < 1)).any()):
        scaled = _keep_likeliest(scaled, top_k, top_p)
    noise = gumbel(
        params.seed_B[drawn],
        params.position_B[drawn],
        params.answer_B[drawn],
        logits_BW.shape[1],
    )
    chosen[drawn] = (scaled + noise).argmax(-1)
    return chosen
