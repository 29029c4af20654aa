"""MLA in its absorbed form: attention to the cached latents themselves. Bound by cache bytes."""

import torch
from torch import Tensor

from dsv3_kernels.kv_fp8 import unpack_latent
from dsv3_kernels.merge_lse import softmax_lse
from dsv3_kernels.paging import Keys, Paging

# Values held at a time by the reference: 4 MiB of float32, which a processor's cache holds.
_SCORES = 1 << 20


def mla_decode_ref(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    value_dim: int,
    scale: float,
    keys: Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """Define `mla_decode`."""
    B, Q, H, X = q_BQHX.shape
    keys = keys or paging.keys(page_BG, query_pos_BQ)
    sequences, width = (q_BQHX, keys.slot_BS, query_pos_BQ), len(keys.key_pos_S)
    step = max(1, _SCORES // max(1, width * max(Q * H, X)))
    if step >= B:
        return _attend(cache_SX, keys.key_pos_S, value_dim, scale, *sequences)
    blocks = zip(*(x.split(step) for x in sequences), strict=True)
    parts = [_attend(cache_SX, keys.key_pos_S, value_dim, scale, *block) for block in blocks]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend(
    cache_SX: Tensor,
    key_pos_S: Tensor,
    value_dim: int,
    scale: float,
    q_BQHX: Tensor,
    slot_BS: Tensor,
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
    hidden_BQS = key_pos_S > query_pos_BQ.unsqueeze(2)
    p, lse = softmax_lse(score_BQHS.masked_fill_(hidden_BQS.unsqueeze(2), float("-inf")))
    out = torch.bmm(p.flatten(1, 2), kv_BSX[..., :value_dim])
    return out.view(B, Q, H, -1), lse


def mla_decode(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    value_dim: int,
    scale: float,
    keys: Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to cached latents, all heads sharing one key (the absorbed form).

    A key is a whole cache entry (latent, then rotated key), its value the latent in front.

    Args:
        q_BQHX: [B, Q, H, C + R] absorbed queries of B sequences.
        cache_SX: [slots, C + R], one layer of this rank's cache; uint8 for the packed FP8 form.
        page_BG: [B, G] int32 pages of each sequence, filled up with page 0.
        query_pos_BQ: [B, Q] int64 positions; a query sees keys up to its own, so none at -1.
        paging: which of the positions this rank holds, and where.
        value_dim: C.
        scale: multiplies the scores.
        keys: `paging.keys` of these tables, if the caller has them already; saves the reference
            spelling them out in every layer.

    Returns:
        o_BQHC: [B, Q, H, C] float32, 0 where a query sees no key.
        lse_BQH: [B, Q, H] float32, -inf there.

    Source: DeepSeek-V2 paper, 2.1.2 and appendix C (absorption of W_UK and W_UV).
    """
    return mla_decode_ref(q_BQHX, cache_SX, page_BG, query_pos_BQ, paging, value_dim, scale, keys)
