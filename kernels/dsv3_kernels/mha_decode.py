"""Decode attention over expanded keys and values (the naive cache). Bound by cache bytes."""

import torch
from torch import Tensor

from dsv3_kernels.merge_lse import softmax_lse
from dsv3_kernels.paging import Keys, Paging

# Values held at a time by the reference: 64 MiB of float32.
_SCORES = 1 << 24


def mha_decode_ref(
    q_BHX: Tensor,
    cache_SY: Tensor,
    page_BG: Tensor,
    query_pos_B: Tensor,
    paging: Paging,
    scale: float,
    keys: Keys | None = None,
) -> Tensor:
    """Define `mha_decode`."""
    B, H, X = q_BHX.shape
    keys = keys or paging.keys(page_BG, query_pos_B[:, None])
    slot_BS = keys.slot_BS
    S = slot_BS.shape[1]
    V = cache_SY.shape[1] // H - X
    out = torch.empty(B, H, V, dtype=torch.float32, device=q_BHX.device)
    step = max(1, _SCORES // max(1, S * cache_SY.shape[1]))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        kv = cache_SY.index_select(0, slot_BS[rows].flatten()).view(-1, S, H, X + V).float()
        score = torch.einsum("bhx,bshx->bhs", q_BHX[rows].float() * scale, kv[..., :X])
        hidden = keys.key_pos_S > query_pos_B[rows, None]
        p, _ = softmax_lse(score.masked_fill_(hidden.unsqueeze(1), float("-inf")))
        out[rows] = torch.einsum("bhs,bshv->bhv", p, kv[..., X:])
    return out


def mha_decode(
    q_BHX: Tensor,
    cache_SY: Tensor,
    page_BG: Tensor,
    query_pos_B: Tensor,
    paging: Paging,
    scale: float,
    keys: Keys | None = None,
) -> Tensor:
    """Attend to cached expanded keys and values, one query token per sequence (naive form).

    Args:
        q_BHX: [B, H, N + R].
        cache_SY: [slots, H * (N + R + V)]: per head its key, then its value.
        page_BG: [B, G] int32 pages of each sequence, filled up with page 0.
        query_pos_B: [B] int64 positions; a query sees keys up to its own, so none at -1.
        paging: which of the positions this rank holds, and where.
        scale: multiplies the scores.
        keys: `paging.keys` of these tables, if the caller has them already.

    Returns:
        [B, H, V] float32, 0 where a query sees no key.
    """
    return mha_decode_ref(q_BHX, cache_SY, page_BG, query_pos_B, paging, scale, keys)
