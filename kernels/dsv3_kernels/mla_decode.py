"""MLA in its absorbed form: attention to the cached latents themselves. Bound by cache bytes."""

import torch
from torch import Tensor

from dsv3_kernels.kv_fp8 import unpack_latent
from dsv3_kernels.merge_lse import softmax_lse

# Values held at a time by the reference: 64 MiB of float32.
_SCORES = 1 << 24


def mla_decode_ref(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    slot_BS: Tensor,
    key_pos_BS: Tensor,
    query_pos_BQ: Tensor,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Define `mla_decode`."""
    B, Q, H, X = q_BQHX.shape
    S = slot_BS.shape[1]
    out = torch.empty(B, Q, H, value_dim, dtype=torch.float32, device=q_BQHX.device)
    lse = torch.empty(B, Q, H, dtype=torch.float32, device=q_BQHX.device)
    step = max(1, _SCORES // max(1, S * max(Q * H, X)))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        kv = cache_SX.index_select(0, slot_BS[rows].flatten())
        if kv.dtype == torch.uint8:
            kv = unpack_latent(kv, value_dim, torch.float32)
        kv = kv.view(-1, S, X).float()
        hidden = key_pos_BS[rows, None, :] > query_pos_BQ[rows, :, None]
        q = q_BQHX[rows].float().flatten(1, 2) * scale
        score = torch.bmm(q, kv.transpose(1, 2)).view(-1, Q, H, S)
        score.masked_fill_(hidden.unsqueeze(2), float("-inf"))
        p, part = softmax_lse(score)
        out[rows] = torch.bmm(p.flatten(1, 2), kv[..., :value_dim]).view(-1, Q, H, value_dim)
        lse[rows] = part
    return out, lse


def mla_decode(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    slot_BS: Tensor,
    key_pos_BS: Tensor,
    query_pos_BQ: Tensor,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to cached latents, all heads sharing one key (the absorbed form).

    A key is a whole cache entry (latent, then rotated key), its value the latent in front. The
    slots may be any subset of a sequence's positions in any order: a rank's shard of them, say.

    Args:
        q_BQHX: [B, Q, H, C + R] absorbed queries of B sequences.
        cache_SX: [slots, C + R], one layer of this rank's cache; uint8 for the packed FP8 form.
        slot_BS: [B, S] int64 slots to attend to; slot 0 is never written and pads rows.
        key_pos_BS: [B, S] position of each slot's token; padding has one above every query.
        query_pos_BQ: [B, Q] positions of the queries; a query sees keys up to its own.
        value_dim: C.
        scale: multiplies the scores.

    Returns:
        o_BQHC: [B, Q, H, C] float32, 0 where a query sees no key.
        lse_BQH: [B, Q, H] float32, -inf there.

    Source: DeepSeek-V2 paper, 2.1.2 and appendix C (absorption of W_UK and W_UV).
    """
    return mla_decode_ref(q_BQHX, cache_SX, slot_BS, key_pos_BS, query_pos_BQ, value_dim, scale)
