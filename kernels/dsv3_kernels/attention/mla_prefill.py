"""MLA prefill attention in the expanded form: every head has its own keys and values.

Bound by FLOPs. A key is given in two parts, the head's expanded part and the rotated part that all
heads may share, so no copy has to join them.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels.attention._mla_prefill_kernel import launch_prefill
from dsv3_kernels.attention.keys_values import KeysValues
from dsv3_kernels.attention.merge_lse import softmax_lse
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.operation import operation

# Scores in memory at a time in the reference: 1 MiB of float32, which fit a processor's cache.
_SCORES = 1 << 18


def _attend(
    q_LQHX: Tensor, keys: KeysValues, L: int, first_key: int, first_query: int, scale: float
) -> PartialOutputs:
    """Compute the references for L sequences of one length, whose keys follow one another."""
    k_LHSX = torch.cat([_by_sequence(x, L) for x in (keys.k_SHN, keys.k_SHR)], -1).float()
    v_LHSV = _by_sequence(keys.v_SHV, L).float()
    _, H, S, _ = k_LHSX.shape
    Q = q_LQHX.shape[1]
    q_LHQX = q_LQHX.float().transpose(1, 2) * scale
    pos = torch.arange(max(first_key + S, first_query + Q), device=q_LQHX.device)
    out = v_LHSV.new_empty(L, Q, H, v_LHSV.shape[-1])
    lse = out.new_empty(L, Q, H)
    is_ahead = first_key > first_query  # then the first queries see no key
    step = max(1, _SCORES // (L * H * max(S, 1)))
    for i in range(0, Q, step):
        rows = slice(i, min(i + step, Q))
        # No query of these rows sees a key after the last of them.
        seen = max(1, min(S, first_query + rows.stop - first_key))
        score = torch.matmul(q_LHQX[:, :, rows], k_LHSX[:, :, :seen].mT)
        if first_key + seen - 1 > first_query + i:
            key_pos = pos[first_key:][:seen]
            query_pos = pos[first_query:][rows]
            score.masked_fill_(key_pos > query_pos[:, None], float("-inf"))
        p, part = softmax_lse(score, (score == float("-inf")).all(-1) if is_ahead else None)
        out[:, rows] = torch.matmul(p, v_LHSV[:, :, :seen]).transpose(1, 2)
        lse[:, rows] = part.transpose(1, 2)
    return PartialOutputs(out, lse)


def _by_sequence(x_SHY: Tensor, L: int) -> Tensor:
    """Return rows of L sequences of one length as [L, H, S, Y]."""
    return x_SHY.unflatten(0, (L, -1)).transpose(1, 2)


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
    o_LQHV, lse_LQH = _attend(q_QHX[None], keys, 1, first_key, first_query, scale)
    return PartialOutputs(o_LQHV[0], lse_LQH[0])


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
        _attend(
            q_THX[run.start : run.stop].unflatten(0, (run.num_sequences, -1)),
            keys.rows(run.start, run.stop),
            L=run.num_sequences,
            first_key=0,
            first_query=0,
            scale=scale,
        )
        for run in _equal_runs(start_L.tolist(), q_THX.shape[1])
    ]
    return PartialOutputs(
        torch.cat([part.o.flatten(0, 1) for part in parts]),
        torch.cat([part.lse.flatten(0, 1) for part in parts]),
    )


class _Run(NamedTuple):
    """Rows start .. stop - 1: `num_sequences` of one length, one after the other."""

    start: int
    stop: int
    num_sequences: int


def _equal_runs(starts: list[int], num_heads: int) -> Iterator[_Run]:
    """Yield runs of sequences of one length, with at most `_SCORES` scores each if possible."""
    lengths = [stop - start for start, stop in pairwise(starts)]
    start = starts[0]
    for length, run in groupby(lengths):
        most = max(1, _SCORES // max(1, num_heads * length * length))
        count = len(list(run))
        for first in range(0, count, most):
            some = min(most, count - first)
            yield _Run(start, start + some * length, some)
            start += some * length
