"""The best index scores of each query, with a rule for ties that holds at every world size.

A candidate is one int64: the score's bits, in an order that integers have too, above the complement
of the position. So the larger of two candidates has the higher score or, of equal scores, the lower
position; no two candidates of a query are equal; and candidates of several ranks are merged by the
selection that made them.

In the kernels a row of up to 16,384 scores is selected by one program, which reads it once; longer
rows by several programs, and a second launch merges their candidates.
"""

import torch
from torch import Tensor

from dsv3_kernels.attention.paging import PageTables, Paging
from dsv3_kernels.index._top_k_kernels import (
    NO_CANDIDATE,
    launch_select_slots,
    launch_top_candidates,
)
from dsv3_kernels.operation import operation

_LOW = (1 << 32) - 1
# Scores that a program of the kernel selects from, and candidates that it merges.
_BLOCK = 1 << 14


def candidate_positions(candidate_TK: Tensor) -> Tensor:
    """Return the positions of candidates, int64; -1 for `NO_CANDIDATE`."""
    position = _LOW - (candidate_TK & _LOW)
    return position.masked_fill(candidate_TK == NO_CANDIDATE, -1)


def _launch_top_candidates(score_TS: Tensor, k: int, tables: PageTables) -> Tensor:
    return launch_top_candidates(score_TS, k, tables, _BLOCK)


@operation(kernel=_launch_top_candidates)
def top_candidates(score_TS: Tensor, k: int, tables: PageTables) -> Tensor:
    """Return the k best positions of each query among those that this rank stores.

    Args:
        score_TS: [T, S] float32, from `index_scores`; those of positions that a query does not see
            are not read.
        k: candidates wanted; if S is smaller, S.
        tables: of the T queries, by sequences [B, Q].

    Returns:
        [T, min(k, S)] int64 in order of position, `NO_CANDIDATE` last.
    """
    S = score_TS.shape[1]
    k = min(k, S)
    paging = tables.paging
    last_T1 = tables.query_pos_BQ.reshape(-1, 1)
    position_S = torch.arange(S, device=score_TS.device) * paging.shards + paging.shard
    score_TS = score_TS.masked_fill(position_S > last_T1, float("-inf"))
    best = score_TS.topk(k, sorted=False)
    candidate_TK = _candidates(best.values, position_S[best.indices])
    # `topk` may choose any of the scores that equal its lowest one.
    lowest_T1 = best.values.amin(1, keepdim=True)
    has_choice_T = (score_TS >= lowest_T1).sum(1, dtype=torch.int32) > k
    if has_choice_T.any():
        every_TS = _candidates(score_TS[has_choice_T], position_S)
        candidate_TK[has_choice_T] = every_TS.topk(k, sorted=False).values
    is_later_TK = candidate_positions(candidate_TK) > last_T1
    return _by_position(candidate_TK.masked_fill_(is_later_TK, NO_CANDIDATE))


def _candidates(score_TS: Tensor, position: Tensor) -> Tensor:
    """Return scores with their positions as candidates; the positions are [T, S] or [S]."""
    # 0 + -0 is 0: both zeros are equal scores, with different bits.
    bits_TS = (score_TS + 0.0).view(torch.int32)
    ordered_TS = (bits_TS ^ ((bits_TS >> 31) & 0x7FFFFFFF)).long()
    return (ordered_TS << 32) | (_LOW - position)


def _by_position(candidate_TK: Tensor) -> Tensor:
    """Return candidates in order of position, `NO_CANDIDATE` last."""
    place_TK = candidate_positions(candidate_TK)
    place_TK = place_TK.masked_fill(place_TK < 0, _LOW)
    return candidate_TK.gather(1, place_TK.argsort(1))


def _launch_select_slots(candidate_PTK: Tensor, k: int, tables: PageTables) -> PageTables:
    slot_TK, last_T = launch_select_slots(candidate_PTK, k, tables)
    return PageTables(slot_TK, last_T[:, None], Paging(1))


@operation(kernel=_launch_select_slots)
def select_slots(candidate_PTK: Tensor, k: int, tables: PageTables) -> PageTables:
    """Merge the candidates of P ranks, and return the selected positions that this rank stores.

    A selection is a page table of pages of one slot, so attention reads it like any other.

    Args:
        candidate_PTK: [P, T, K] int64, contiguous, from `top_candidates` on each of the ranks that
            share the positions, in order of their shards; P = 1 for this rank's alone.
        k: positions that a query attends to.
        tables: of the T queries, by sequences [B, Q].

    Returns:
        Tables of T sequences of one query: the slots in order of position, filled up with 0. The
        "position" of a query is the number of its slots, less one.
    """
    paging = tables.paging
    candidate_TM = candidate_PTK.transpose(0, 1).flatten(1)
    k = min(k, candidate_TM.shape[1])
    if len(candidate_PTK) > 1:
        candidate_TM = candidate_TM.topk(k, sorted=False).values
        is_other_TK = candidate_positions(candidate_TM) % paging.shards != paging.shard
        candidate_TM = _by_position(candidate_TM.masked_fill_(is_other_TK, NO_CANDIDATE))
    position_TK = candidate_positions(candidate_TM)
    num_T = (position_TK >= 0).sum(1)
    position_TK.clamp_min_(0)
    page_TG = tables.page_BG.repeat_interleave(tables.query_pos_BQ.shape[1], 0)
    page_TK = page_TG.gather(1, position_TK // paging.page_size)
    in_page_TK = position_TK % paging.page_size // paging.shards
    slot_TK = page_TK * paging.slots_per_page + in_page_TK
    is_padding_TK = torch.arange(k, device=num_T.device) >= num_T[:, None]
    slot_TK = slot_TK.masked_fill(is_padding_TK, 0).int()
    return PageTables(slot_TK, num_T[:, None] - 1, Paging(1))
