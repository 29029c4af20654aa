"""MLA in its absorbed form: attention to the cached latents themselves. Bound by cache bytes."""

import torch
from torch import Tensor

from dsv3_kernels.kv_fp8 import unpack_latent
from dsv3_kernels.merge_lse import softmax_lse

# Values held at a time by the reference: 4 MiB of float32, which a processor's cache holds.
_SCORES = 1 << 20


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
    sequences = q_BQHX, slot_BS, key_pos_BS, query_pos_BQ
    step = max(1, _SCORES // max(1, slot_BS.shape[1] * max(Q * H, X)))
    if step >= B:
        return _attend(cache_SX, value_dim, scale, *sequences)
    blocks = zip(*(x.split(step) for x in sequences), strict=True)
    parts = [_attend(cache_SX, value_dim, scale, *block) for block in blocks]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend(
    cache_SX: Tensor,
    value_dim: int,
    scale: float,
    q_BQHX: Tensor,
    slot_BS: Tensor,
    key_pos_BS: Tensor,
    query_pos_BQ: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do the same for so few sequences that all they look at is held at once."""
    B, Q, H, _ = q_BQHX.shape
    kv = cache_SX.index_select(0, slot_BS.flatten())
    if kv.dtype == torch.uint8:
        kv = unpack_latent(kv, value_dim, torch.float32)
    kv_BSX = kv.float().view(B, -1, kv.shape[-1])
    q = q_BQHX.flatten(1, 2).float() * scale
    score_BQHS = torch.bmm(q, kv_BSX.transpose(1, 2)).view(B, Q, H, -1)
    hidden_BQS = key_pos_BS.unsqueeze(1) > query_pos_BQ.unsqueeze(2)
    p, lse = softmax_lse(score_BQHS.masked_fill_(hidden_BQS.unsqueeze(2), float("-inf")))
    out = torch.bmm(p.flatten(1, 2), kv_BSX[..., :value_dim])
    return out.view(B, Q, H, -1), lse


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
