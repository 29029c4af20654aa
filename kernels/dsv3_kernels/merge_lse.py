"""Softmax with its log-sum-exp, and the exact merge of attention over disjoint sets of keys."""

from torch import Tensor


def softmax_lse(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and log-sum-exp over the last dim; rows of only -inf give (0, -inf)."""
    top = score.amax(-1)
    has_none = top == float("-inf")
    p = score.softmax(-1)
    # The likeliest one has p = exp(top - lse).
    lse = (top - p.amax(-1).log()).masked_fill_(has_none, float("-inf"))
    return p.masked_fill_(has_none.unsqueeze(-1), 0.0), lse


def merge_lse_ref(o_NTHV: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Define `merge_lse`."""
    weight_THN, lse_TH = softmax_lse(lse_NTH.movedim(0, -1))
    return (o_NTHV * weight_THN.movedim(-1, 0).unsqueeze(-1)).sum(0), lse_TH


def merge_lse(o_NTHV: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Merge N partial attention results: o = sum_n exp(lse_n - lse) o_n.

    Args:
        o_NTHV: [N, T, H, V] float32, each a softmax average over its own keys.
        lse_NTH: [N, T, H] float32 log-sum-exp of its scores; -inf (with o = 0) for no key.

    Returns:
        o_THV: [T, H, V]; 0 where no part had a key.
        lse_TH: [T, H].
    """
    return merge_lse_ref(o_NTHV, lse_NTH)
