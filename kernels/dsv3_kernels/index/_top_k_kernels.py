"""Kernels of exact top-k selection; see `top_k` for candidates and their order.

A block of scores, in an order that integers have too, is held in registers. A bound on the k best
is found bit by bit from the highest, by counting the scores that reach it, until just k do; of
scores equal to the bound those at the lowest positions are taken. Nothing is sorted: places in the
result are numbers of taken scores that come before. Where all scores are selected, none is counted.

A row of more scores than a block is selected in parts, by several programs; the parts' candidates
are merged in the same way. Parts after the last position that a query sees are neither read nor
written.
"""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention.paging import PageTables

# Smaller than all candidates; stands for a position that a query does not see.
NO_CANDIDATE = -(1 << 63)

_NO_CANDIDATE = tl.constexpr(NO_CANDIDATE)
# Its upper half: stands for no score.
_NONE = tl.constexpr(-(1 << 31))


@triton.jit
def _bound(value, k):
    """Return a bound that k of a block of int32 reach: the highest one, or one that just k reach.

    At least k values must be other than `_NONE`.
    """
    bound = tl.full((), _NONE, tl.int32)
    bit = tl.full((), _NONE, tl.int32)
    count = tl.full((), -1, tl.int32)
    while (bit != 0) & (count != k):
        trial = bound ^ bit  # 0 at first: the sign's bit is set in `_NONE`
        num = tl.sum((value >= trial).to(tl.int32), 0)
        bound = tl.where(num >= k, trial, bound)
        count = tl.where(num >= k, num, count)
        bit = (bit >> 1) & 0x7FFFFFFF
    return bound


@triton.jit
def _take_best(value, is_there, num, k):
    """Choose k of `num` values of a block; of equal ones the first.

    Args:
        value: [BLOCK] int32, `_NONE` where there is none.
        is_there: [BLOCK] True where there is a value.
        num: number of values; if there are fewer than k, all are chosen.
        k: number of values to choose.

    Returns:
        [BLOCK] True for chosen values, and the number of each among them, from 0 on.
    """
    cut = tl.full((), _NONE, tl.int32)
    if num > k:
        cut = _bound(value, k)
    is_above = value > cut
    is_equal = is_there & (value == cut)
    spare = k - tl.sum(is_above.to(tl.int32), 0)
    # Two counts of at most 32,768 in one sum: values above the bound, and equal ones.
    before = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
    above = before & 0xFFFF
    equal = (before >> 16) & 0xFFFF
    is_taken = is_above | (is_equal & (equal <= spare))
    return is_taken, above + tl.minimum(equal, spare) - 1


@triton.jit
def _seen_by(pos_ptr, t, columns, shard, SHARDS: tl.constexpr):
    """Return the number of positions on this rank that a query sees."""
    pos = tl.load(pos_ptr + t).to(tl.int32)
    return tl.minimum((pos + SHARDS - shard) // SHARDS, columns)


@triton.jit
def _fill(out_ptr, value, first, end, BLOCK: tl.constexpr):
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, value, mask=at < end)


_OF_SCORES = ("score_ptr", "pos_ptr", "stride", "columns", "k", "shard")


@triton.jit(do_not_specialize=_OF_SCORES)
def _top_scores_kernel(
    score_ptr,
    pos_ptr,
    out_ptr,
    stride,
    columns,
    k,
    shard,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select the k best scores of a part of a row: BLOCK columns."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    seen = _seen_by(pos_ptr, t, columns, shard, SHARDS)
    num = tl.minimum(tl.maximum(seen - first, 0), BLOCK)
    out = out_ptr + (t * tl.num_programs(1) + tl.program_id(1)) * k
    if num > 0:
        j = first + tl.arange(0, BLOCK)
        is_there = j < seen
        score = tl.load((score_ptr + t * stride) + j, mask=is_there, other=0.0)
        score = tl.where(score == 0.0, 0.0, score)  # both zeros are equal scores
        bits = score.to(tl.int32, bitcast=True)
        value = tl.where(is_there, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NONE)
        is_taken, place = _take_best(value, is_there, num, k)
        position = (j * SHARDS + shard).to(tl.int64)
        candidate = (value.to(tl.int64) << 32) | (0xFFFFFFFF - position)
        tl.store(out + place, candidate, mask=is_taken)
    if tl.num_programs(1) == 1:
        _fill(out, _NO_CANDIDATE, num, k, 256)


_OF_PARTS = ("pos_ptr", "parts", "group", "span", "columns", "k", "shard")


@triton.jit(do_not_specialize=_OF_PARTS)
def _merge_parts_kernel(
    part_ptr,
    word_ptr,  # the same memory, as int32
    pos_ptr,
    out_ptr,
    parts,
    group,
    span,  # columns of a part
    columns,
    k,
    shard,
    SHARDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select the k best candidates of `group` parts of a row, which are in order of position."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * group
    seen = _seen_by(pos_ptr, t, columns, shard, SHARDS)
    out = out_ptr + (t * tl.num_programs(1) + tl.program_id(1)) * k
    num = 0
    if seen > first * span:
        e = tl.arange(0, BLOCK)
        part = e // WIDTH
        in_part = tl.minimum(tl.minimum(seen - (first + part) * span, span), k)
        is_there = (part < group) & (e % WIDTH < in_part)
        at = part * k + e % WIDTH
        words = word_ptr + 2 * (t * parts + first) * k
        value = tl.load(words + 2 * at + 1, mask=is_there, other=_NONE)
        num = tl.sum(is_there.to(tl.int32), 0)
        is_taken, place = _take_best(value, is_there, num, k)
        candidate = tl.load(part_ptr + (t * parts + first) * k + at, mask=is_taken)
        tl.store(out + place, candidate, mask=is_taken)
    if tl.num_programs(1) == 1:
        _fill(out, _NO_CANDIDATE, num, k, 256)


@triton.jit(
    do_not_specialize=["page_ptr", "rows", "ranks", "width", "k", "queries", "pages", "own"]
)
def _select_slots_kernel(
    word_ptr,
    page_ptr,
    slot_ptr,
    last_ptr,
    rows,
    ranks,
    width,  # candidates of a rank
    k,
    queries,
    pages,
    own,  # this rank's place among the ranks
    SLOTS: tl.constexpr,
    SHARDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the bound of a query's k best candidates; write the slots of this rank's."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    rank = e // WIDTH
    is_e = (rank < ranks) & (e % WIDTH < width)
    word_at = (word_ptr + 2 * t * width) + 2 * (rank * rows * width + e % WIDTH)
    score = tl.load(word_at + 1, mask=is_e, other=_NONE)
    # The least score and position that are selected. A position is complemented, as in a candidate.
    cut = tl.full((), _NONE, tl.int32)
    last = tl.full((), _NONE, tl.int32)
    if tl.sum((score != _NONE).to(tl.int32), 0) > k:
        cut = _bound(score, k)
        spare = k - tl.sum((score > cut).to(tl.int32), 0)
        is_equal = score == cut
        if tl.sum(is_equal.to(tl.int32), 0) > spare:
            place = tl.load(word_at, mask=is_e & is_equal, other=_NONE)
            last = _bound(place, spare)
    j = tl.arange(0, WIDTH)
    is_j = j < width
    own_at = word_ptr + 2 * ((own * rows + t) * width + j)
    own_score = tl.load(own_at + 1, mask=is_j, other=_NONE)
    own_place = tl.load(own_at, mask=is_j, other=_NONE)
    is_best = (own_score > cut) | ((own_score == cut) & (own_place >= last))
    is_taken = is_best & (own_score != _NONE)
    position = -1 - own_place
    number = tl.cumsum(is_taken.to(tl.int32), 0)
    page_at = page_ptr + t // queries * pages + position // (SLOTS * SHARDS)
    page = tl.load(page_at, mask=is_taken, other=0)
    slot = page * SLOTS + position // SHARDS % SLOTS
    row = slot_ptr + t * k
    tl.store(row + number - 1, slot, mask=is_taken)
    num = tl.sum(is_taken.to(tl.int32), 0)
    _fill(row, 0, num, k, 256)
    tl.store(last_ptr + t, (num - 1).to(tl.int64))


def _warps_for(block: int) -> int:
    """Return the warps that hold a block of int32 in registers, 32 values in each thread."""
    return min(32, max(4, block // 1024))


def launch_top_candidates(score_TS: Tensor, k: int, tables: PageTables, block: int) -> Tensor:
    """Launch `top_candidates`: select in parts of a row, then merge their candidates.

    Args:
        score_TS: see `top_candidates`.
        k: see `top_candidates`.
        tables: see `top_candidates`.
        block: scores of a part, and about the candidates of a merge; a power of two.
    """
    T, S = score_TS.shape
    k = min(k, S)
    paging = tables.paging
    assert score_TS.stride(1) == 1 and score_TS.dtype == torch.float32, f"{score_TS.stride()=}"
    query_pos = tables.query_pos_BQ.contiguous()
    parts = max(1, cdiv(S, block))
    found = torch.empty(T, parts, k, dtype=torch.int64, device=score_TS.device)
    if not T or not S:
        return found[:, 0]
    size = min(block, max(16, next_power_of_2(S)))
    of_row = {"columns": S, "k": k, "shard": paging.shard, "SHARDS": paging.shards}
    _top_scores_kernel[(T, parts)](
        score_ptr=score_TS,
        pos_ptr=query_pos,
        out_ptr=found,
        stride=score_TS.stride(0),
        **of_row,
        BLOCK=size,
        num_warps=_warps_for(size),
        **launch_options(),
    )
    span = block
    while parts > 1:
        width = next_power_of_2(k)
        group = min(parts, max(2, block // width))
        groups = cdiv(parts, group)
        merged = found.new_empty(T, groups, k)
        size = next_power_of_2(group) * width
        _merge_parts_kernel[(T, groups)](
            part_ptr=found,
            word_ptr=found.view(torch.int32),
            pos_ptr=query_pos,
            out_ptr=merged,
            parts=parts,
            group=group,
            span=span,
            **of_row,
            WIDTH=width,
            BLOCK=size,
            num_warps=_warps_for(size),
            **launch_options(),
        )
        found = merged
        parts = groups
        span = span * group
    return found[:, 0]


def launch_select_slots(candidate_PTK: Tensor, k: int, tables: PageTables) -> tuple[Tensor, Tensor]:
    """Launch `select_slots`, a program per query.

    Returns:
        The slots [T, k] int32, and the number of each query's slots less one, [T] int64.
    """
    P, T, K = candidate_PTK.shape
    paging = tables.paging
    assert P in (1, paging.shards) and candidate_PTK.is_contiguous(), f"{P} ranks, {paging=}"
    assert candidate_PTK.numel() < 1 << 30, f"{candidate_PTK.shape=}"
    tables = tables.contiguous()
    k = min(k, P * K)
    slot_TK = torch.empty(T, k, dtype=torch.int32, device=candidate_PTK.device)
    last_T = torch.empty(T, dtype=torch.int64, device=candidate_PTK.device)
    width = max(16, next_power_of_2(K))
    size = next_power_of_2(P) * width
    if T:
        _select_slots_kernel[(T,)](
            word_ptr=candidate_PTK.view(torch.int32),
            page_ptr=tables.page_BG,
            slot_ptr=slot_TK,
            last_ptr=last_T,
            rows=T,
            ranks=P,
            width=K,
            k=k,
            queries=tables.query_pos_BQ.shape[1],
            pages=tables.page_BG.shape[1],
            own=paging.shard if P > 1 else 0,
            SLOTS=paging.slots_per_page,
            SHARDS=paging.shards,
            WIDTH=width,
            BLOCK=size,
            num_warps=_warps_for(size),
            **launch_options(),
        )
    return slot_TK, last_T
