"""The best index scores of each query, with a rule for ties that holds at every world size.

A candidate is one int64: the score's bits, in an order that integers have too, above the complement
of the position. So the larger of two candidates has the higher score or, of equal scores, the lower
position; no two candidates of a query are equal; and candidates of several ranks are merged by the
selection that made them.
"""

import torch
from torch import Tensor

from dsv3_kernels.attention.paging import PageTables, Paging

# Smaller than all candidates; stands for a position that a query does not see.
NO_CANDIDATE = -(1 << 63)
_LOW = (1 << 32) - 1


def candidate_positions(candidate_TK: Tensor) -> Tensor:
    """Return the positions of candidates, int64; -1 for `NO_CANDIDATE`."""
    position = _LOW - (candidate_TK & _LOW)
    return position.masked_fill(candidate_TK == NO_CANDIDATE, -1)


def top_candidates(score_TS: Tensor, k: int, paging: Paging) -> Tensor:
    """Return the k best positions of each query among those that this rank stores.

    Args:
        score_TS: [T, S] float32, from `index_scores`; -inf where a query does not see the key.
        k: candidates wanted; if S is smaller, S.
        paging: the position of column j is j * shards + shard.

    Returns:
        [T, min(k, S)] int64 in order of position, `NO_CANDIDATE` last.
    """
    S = score_TS.shape[1]
    # 0 + -0 is 0: both zeros are equal scores, with different bits.
    bits_TS = (score_TS + 0.0).view(torch.int32)
    ordered_TS = (bits_TS ^ ((bits_TS >> 31) & 0x7FFFFFFF)).long()
    position_S = torch.arange(S, device=score_TS.device) * paging.shards + paging.shard
    candidate_TS = (ordered_TS << 32) | (_LOW - position_S)
    candidate_TS.masked_fill_(score_TS == float("-inf"), NO_CANDIDATE)
    return _by_position(candidate_TS.topk(min(k, S), sorted=False).values)


def _by_position(candidate_TK: Tensor) -> Tensor:
    """Return candidates in order of position, `NO_CANDIDATE` last."""
    place_TK = candidate_positions(candidate_TK)
    place_TK = place_TK.masked_fill(place_TK < 0, _LOW)
    return candidate_TK.gather(1, place_TK.argsort(1))


def select_slots(candidate_PTK: Tensor, k: int, tables: PageTables) -> PageTables:
    """Merge the candidates of P ranks, and return the selected positions that this rank stores.

    A selection is a page table of pages of one slot, so attention reads it like any other.

    Args:
        candidate_PTK: [P, T, K] int64, from `top_candidates` on each rank.
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
        candidate_TM = _by_position(candidate_TM.topk(k, sorted=False).values)
    position_TK = candidate_positions(candidate_TM)
    is_own_TK = (position_TK >= 0) & (position_TK % paging.shards == paging.shard)
    # Own positions first, in their order.
    order_TK = is_own_TK.logical_not().to(torch.int8).argsort(stable=True)
    position_TK = position_TK.clamp_min(0).gather(1, order_TK)
    page_TG = tables.page_BG.repeat_interleave(tables.query_pos_BQ.shape[1], 0)
    page_TK = page_TG.gather(1, position_TK // paging.page_size)
    in_page_TK = position_TK % paging.page_size // paging.shards
    slot_TK = page_TK * paging.slots_per_page + in_page_TK
    num_T = is_own_TK.sum(1)
    is_padding_TK = torch.arange(k, device=num_T.device) >= num_T[:, None]
    slot_TK = slot_TK.masked_fill(is_padding_TK, 0).int()
    return PageTables(slot_TK, num_T[:, None] - 1, Paging(1))
