"""MLA in its expanded form: every head has its own keys and values. Bound by FLOPs."""

import torch
from torch import Tensor

from dsv3_kernels.merge_lse import softmax_lse

# Scores held at a time by the reference: 64 MiB of float32.
_SCORES = 1 << 24


def mla_prefill_ref(
    q_QHX: Tensor, k_SHX: Tensor, v_SHV: Tensor, first_key: int, first_query: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Define `mla_prefill`."""
    q, k, v = (t.float().transpose(0, 1) for t in (q_QHX, k_SHX, v_SHV))
    (H, Q), S = q.shape[:2], k.shape[1]
    key_pos = torch.arange(first_key, first_key + S, device=q.device)
    out, lse = q.new_empty(Q, H, v.shape[-1]), q.new_empty(Q, H)
    step = max(1, _SCORES // (H * max(S, 1)))
    for i in range(0, Q, step):
        score = torch.matmul(q[:, i : i + step] * scale, k.transpose(1, 2))
        query_pos = torch.arange(first_query + i, first_query + i + score.shape[1], device=q.device)
        if first_key + S - 1 > first_query + i:
            score.masked_fill_(key_pos > query_pos[:, None], float("-inf"))
        p, part = softmax_lse(score)
        out[i : i + step] = torch.matmul(p, v).transpose(0, 1)
        lse[i : i + step] = part.transpose(0, 1)
    return out, lse


def mla_prefill(
    q_QHX: Tensor, k_SHX: Tensor, v_SHV: Tensor, first_key: int, first_query: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally, one sequence, every head with its own keys (the expanded form).

    Args:
        q_QHX: [Q, H, N + R] queries at positions first_query, first_query + 1, ...
        k_SHX: [S, H, N + R] keys at positions first_key, first_key + 1, ...
        v_SHV: [S, H, V].
        first_key: position of the first key.
        first_query: position of the first query.
        scale: multiplies the scores.

    Returns:
        o_QHV: [Q, H, V] float32.
        lse_QH: [Q, H] float32; -inf where a query sees no key.
    """
    return mla_prefill_ref(q_QHX, k_SHX, v_SHV, first_key, first_query, scale)
