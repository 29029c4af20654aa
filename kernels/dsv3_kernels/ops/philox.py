"""Counter-based random numbers: a number depends on its key and counter only, not on a stream."""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import tl, triton

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * b; all numbers are int64, none overflows."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a
    total = high + (low >> 16)
    return (total >> 16) & _MASK, ((total << 16) | (low & 0xFFFF)) & _MASK


def philox(seed_B: Tensor, position_B: Tensor, answer_B: Tensor, block_W: Tensor) -> Tensor:
    """Return four random 32-bit words for each counter (block, position, answer) under each key.

    Args:
        seed_B: [B] int64 keys.
        position_B: [B] int64 positions, part of the counter.
        answer_B: [B] int64 answers, part of the counter.
        block_W: [W] int64 counters.

    Returns:
        [B, W, 4] int64 in [0, 2^32).

    Source: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    k0 = (seed_B & _MASK)[:, None]
    k1 = ((seed_B >> 32) & _MASK)[:, None]
    c0 = block_W[None, :].expand(seed_B.shape[0], -1)
    c1 = position_B[:, None].expand_as(c0)
    c2 = answer_B[:, None].expand_as(c0)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _mul(_ROUND[0], c0)
        high1, low1 = _mul(_ROUND[1], c2)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def to_uniform(words: Tensor) -> Tensor:
    """Return the top 23 bits, plus a half, over 2^23: in (0, 1), so both logarithms are finite."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed_B: Tensor, position_B: Tensor, answer_B: Tensor, vocab: int) -> Tensor:
    """Return standard Gumbel noise for ids 0 .. vocab - 1, [B, vocab] float32."""
    blocks = torch.arange(cdiv(vocab, 4), device=seed_B.device)
    words = philox(seed_B, position_B, answer_B, blocks).flatten(1)[:, :vocab]
    return -torch.log(-torch.log(to_uniform(words)))


@triton.jit
def uniform_block(seed, position, answer, first, BLOCK: tl.constexpr):
    """Return the uniform numbers of `gumbel` for the ids from `first`, a multiple of 4, on."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    at = zero + position.to(tl.uint32)
    which = zero + answer.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, at, which, zero)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
