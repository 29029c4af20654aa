"""Masks of tokens: a bit for each, 1 where it may be sampled.

Rank 0 computes them, they travel in the plan as words of 32 tokens, and every rank applies them to
the whole rows of logits that it samples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.int32]
_WORD_BITS = 32


def num_words(vocab_size: int) -> int:
    """Return the number of words of a mask."""
    return -(-vocab_size // _WORD_BITS)


def all_but(token_ids: Sequence[int], vocab_size: int) -> Words:
    """Return the mask that allows all tokens but some."""
    bits = np.ones(num_words(vocab_size) * _WORD_BITS, np.uint8)
    bits[list(token_ids)] = 0
    return np.packbits(bits, bitorder="little").view(np.int32)


def forbid(logits_LW: Tensor, words_LX: Tensor) -> Tensor:
    """Return logits with minus infinity for the tokens that the mask of their row forbids.

    Args:
        logits_LW: [L, W] the rows that have a mask.
        words_LX: [L, `num_words(W)`] int32 masks of these rows.
    """
    bit_32 = torch.arange(_WORD_BITS, dtype=torch.int32, device=words_LX.device)
    is_allowed_LW = (words_LX[:, :, None] >> bit_32 & 1).flatten(1)[:, : logits_LW.shape[1]]
    return logits_LW.masked_fill(is_allowed_LW == 0, -torch.inf)
