"""MLA in its expanded form: every head has its own keys and values. Bound by FLOPs."""

import torch
from torch import Tensor

from dsv3_kernels.merge_lse import softmax_lse

# Scores held at a time by the reference: 1 MiB of float32, which a processor's cache holds.
_SCORES = 1 << 18


def mla_prefill_ref(
    q_QHX: Tensor, k_SHX: Tensor, v_SHV: Tensor, first_key: int, first_query: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Define `mla_prefill`."""
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
