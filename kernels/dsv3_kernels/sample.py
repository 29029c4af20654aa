"""Sampling by counter-based Gumbel noise: the same logits, parameters and seed give the same token.

Token = argmax over the kept vocabulary of logit / temperature + g(seed, position, id), where g is
Gumbel noise computed from a counter, not drawn from a stream. So the choice does not depend on
batch, world size or what was sampled before. Ties go to the lowest id.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * b, all held in int64 without overflow."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    total = high + (low >> 16)
    return (total >> 16) & _MASK, ((total << 16) | (low & 0xFFFF)) & _MASK


def philox(seed_B: Tensor, position_B: Tensor, block_W: Tensor) -> Tensor:
    """Return four random 32-bit words for each counter (block, position) under each key.

    Args:
        seed_B: [B] int64 keys.
        position_B: [B] int64 positions, part of the counter.
        block_W: [W] int64 counters.

    Returns:
        [B, W, 4] int64 in [0, 2^32).

    Source: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    k0, k1 = (seed_B & _MASK)[:, None], ((seed_B >> 32) & _MASK)[:, None]
    c0 = block_W[None, :].expand(seed_B.shape[0], -1)
    c1 = position_B[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _mul(_ROUND[0], c0)
        high1, low1 = _mul(_ROUND[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def gumbel(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """Return standard Gumbel noise for ids 0 .. vocab - 1, [B, vocab] float32."""
    blocks = torch.arange(-(-vocab // 4), device=seed_B.device)
    words = philox(seed_B, position_B, blocks).flatten(1)[:, :vocab]
    # 23 bits and a half: strictly inside (0, 1), so that both logarithms are finite.
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _keep_likeliest(logits_BW: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Set what top-k, then top-p, would drop to -inf. Equal logits: the lowest ids are kept."""
    order = logits_BW.sort(dim=-1, descending=True, stable=True)
    rank_W = torch.arange(logits_BW.shape[1], device=logits_BW.device)
    limit_B = torch.where(top_k_B > 0, top_k_B, logits_BW.shape[1])
    ranked = order.values.masked_fill(rank_W >= limit_B[:, None], float("-inf"))
    p = ranked.softmax(-1)
    # A token stays while the likelier ones before it do not yet reach top_p; the first always,
    # and all of them at top_p = 1, which the rounded sum may reach early.
    reach_B = torch.where(top_p_B < 1, top_p_B, 2.0)
    ranked.masked_fill_((p.cumsum(-1) - p >= reach_B[:, None]) & (rank_W > 0), float("-inf"))
    return torch.empty_like(ranked).scatter_(1, order.indices, ranked)


def sample_ref(
    logits_BW: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
) -> Tensor:
    """Define `sample`."""
    chosen = logits_BW.argmax(-1)
    drawn = temperature_B > 0
    if not bool(drawn.any()):
        return chosen
    scaled = logits_BW[drawn]
    # The best one becomes 0, so that a tiny temperature cannot overflow it.
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature_B[drawn, None]
    top_k, top_p = top_k_B[drawn], top_p_B[drawn]
    if bool(((top_k > 0) | (top_p < 1)).any()):
        scaled = _keep_likeliest(scaled, top_k, top_p)
    noise = gumbel(seed_B[drawn], position_B[drawn], logits_BW.shape[1])
    chosen[drawn] = (scaled + noise).argmax(-1)
    return chosen


def sample(
    logits_BW: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
) -> Tensor:
    """Choose one token per row: temperature first, then top-k, then top-p.

    Args:
        logits_BW: [B, W] float32, whole vocabulary rows.
        temperature_B: [B] float32; 0 is greedy.
        top_k_B: [B] int64; 0 keeps all.
        top_p_B: [B] float32 in (0, 1].
        seed_B: [B] int64, the request's seed.
        position_B: [B] int64, position of the token to be chosen.

    Returns:
        [B] int64 token ids.

    Source: Gumbel-max trick (Gumbel 1954); counters as in `philox`.
    """
    return sample_ref(logits_BW, temperature_B, top_k_B, top_p_B, seed_B, position_B)
