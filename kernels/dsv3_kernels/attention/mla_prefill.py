"""MLA prefill attention in the expanded form: every head has its own keys and values.

Bound by FLOPs. A key is given in two parts, the head's expanded part and the rotated part that all
heads may share, so no copy has to join them.
"""

from itertools import pairwise

import torch
from torch import Tensor

from dsv3_kernels.attention._mla_prefill_kernel import launch_prefill
from dsv3_kernels.attention.keys_values import KeysValues
from dsv3_kernels.attention.merge_lse import softmax_lse
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.operation import operation

# Scores in memory at a time in the reference: 1 MiB of float32, which fit a processor's cache.
_SCORES = 1 << 18


def _launch_mla_prefill(
    q_QHX: Tensor, keys: KeysValues, first_key: int, first_query: int, scale: float
) -> PartialOutputs:
    return launch_prefill(
        q_QHX,
        keys,
        start_L=None,
        longest=len(q_QHX),
        ahead=first_query - first_key,
        scale=scale,
        tile=None,
    )


@operation(kernel=_launch_mla_prefill)
def mla_prefill(
    q_QHX: Tensor, keys: KeysValues, first_key: int, first_query: int, scale: float
) -> PartialOutputs:
    """Attend causally, one sequence, every head with its own keys (the expanded form).

    Args:
        q_QHX: [Q, H, N + R] queries at positions first_query, first_query + 1, ...
        keys: S keys at positions first_key, first_key + 1, ...
        first_key: position of the first key.
        first_query: position of the first query.
        scale: multiplies the scores.

    Returns:
        o_QHV: [Q, H, V] float32.
        lse_QH: [Q, H] float32; -inf for a query without keys.
    """
    k_SHX = torch.cat((keys.k_SHN, keys.k_SHR), -1)
    q, k, v = (t.float().transpose(0, 1) for t in (q_QHX, k_SHX, keys.v_SHV))
    H, Q, _ = q.shape
    S = k.shape[1]
    pos = torch.arange(max(first_key + S, first_query + Q), device=q.device)
    out = q.new_empty(Q, H, v.shape[-1])
    lse = q.new_empty(Q, H)
    is_ahead = first_key > first_query  # then the first queries see no key
    step = max(1, _SCORES // (H * max(S, 1)))
    for i in range(0, Q, step):
        rows = slice(i, min(i + step, Q))
        # No query of these rows sees a key after the last of them.
        seen = max(1, min(S, first_query + rows.stop - first_key))
        score = torch.matmul(q[:, rows] * scale, k[:, :seen].transpose(1, 2))
        if first_key + seen - 1 > first_query + i:
            key_pos = pos[first_key:][:seen]
            query_pos = pos[first_query:][rows]
            score.masked_fill_(key_pos > query_pos[:, None], float("-inf"))
        p, part = softmax_lse(score, (score == float("-inf")).all(-1) if is_ahead else None)
        out[rows] = torch.matmul(p, v[:, :seen]).transpose(0, 1)
        lse[rows] = part.transpose(0, 1)
    return PartialOutputs(out, lse)


def _launch_mla_prefill_packed(
    q_THX: Tensor, keys: KeysValues, start_L: Tensor, longest: int, scale: float
) -> PartialOutputs:
    return launch_prefill(
        q_THX, keys, start_L=start_L, longest=longest, ahead=0, scale=scale, tile=None
    )


@operation(kernel=_launch_mla_prefill_packed)
def mla_prefill_packed(
    q_THX: Tensor, keys: KeysValues, start_L: Tensor, longest: int, scale: float
) -> PartialOutputs:
    """Attend causally within each of several packed sequences.

    Args:
        q_THX: [T, H, N + R].
        keys: of the same T tokens.
        start_L: [L + 1] int32 first row of each sequence, then T.
        longest: rows of the longest sequence, on the host. Not used by the reference.
        scale: multiplies the scores.

    Returns:
        o_THV: [T, H, V] float32.
        lse_TH: [T, H] float32.
    """
    parts = [
        mla_prefill.reference(q_THX[a:b], keys.rows(a, b), 0, 0, scale)
        for a, b in pairwise(start_L.tolist())
    ]
    if len(parts) == 1:
        return parts[0]
    return PartialOutputs(
        torch.cat([part.o for part in parts]), torch.cat([part.lse for part in parts])
    )
