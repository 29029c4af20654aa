"""Decode attention over expanded keys and values (the naive cache). Bound by cache bytes."""

import torch
from torch import Tensor

# Values held at a time by the reference: 64 MiB of float32.
_SCORES = 1 << 24


def mha_decode_ref(
    q_BHX: Tensor,
    cache_SY: Tensor,
    slot_BS: Tensor,
    key_pos_BS: Tensor,
    query_pos_B: Tensor,
    scale: float,
) -> Tensor:
    """Define `mha_decode`."""
    B, H, X = q_BHX.shape
    S = slot_BS.shape[1]
    V = cache_SY.shape[1] // H - X
    out = torch.empty(B, H, V, dtype=torch.float32, device=q_BHX.device)
    step = max(1, _SCORES // max(1, S * cache_SY.shape[1]))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        kv = cache_SY.index_select(0, slot_BS[rows].flatten()).view(-1, S, H, X + V).float()
        score = torch.einsum("bhx,bshx->bhs", q_BHX[rows].float() * scale, kv[..., :X])
        hidden = key_pos_BS[rows] > query_pos_B[rows, None]
        score.masked_fill_(hidden.unsqueeze(1), float("-inf"))
        out[rows] = torch.einsum("bhs,bshv->bhv", score.softmax(-1), kv[..., X:])
    return out


def mha_decode(
    q_BHX: Tensor,
    cache_SY: Tensor,
    slot_BS: Tensor,
    key_pos_BS: Tensor,
    query_pos_B: Tensor,
    scale: float,
) -> Tensor:
    """Attend to cached expanded keys and values, one query token per sequence (naive form).

    Args:
        q_BHX: [B, H, N + R].
        cache_SY: [slots, H * (N + R + V)]: per head its key, then its value.
        slot_BS: [B, S] int64 slots, padded with slot 0.
        key_pos_BS: [B, S] positions; padding has one above every query.
        query_pos_B: [B] positions; every query sees at least one key.
        scale: multiplies the scores.

    Returns:
        [B, H, V] float32.
    """
    return mha_decode_ref(q_BHX, cache_SY, slot_BS, key_pos_BS, query_pos_B, scale)
