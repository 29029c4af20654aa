"""Partial outputs of attention, and the form in which ranks exchange them.

In the exchanged form an average over some of the keys and its float32 log-sum-exp share a row: the
values in the activations' dtype, then 64 bytes that begin with the log-sum-exp. A row of V3 is then
a multiple of 16 values, which the compiler requires of a stride to load 16 bytes at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_TAIL_BYTES = 64


class PartialOutputs(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        o: [..., C] averages of the values, weighted by a softmax over these keys; 0 without keys.
        lse: [...] float32 log-sum-exp of the scores; -inf without keys.
    """

    o: Tensor
    lse: Tensor


def part_bytes(value_dim: int, itemsize: int) -> int:
    """Return the bytes of a row."""
    return value_dim * itemsize + _TAIL_BYTES


def empty_parts(q_PTHX: Tensor, value_dim: int) -> Tensor:
    """Return uninitialized rows [P, T, H, Y] for the partial outputs of these queries."""
    width = part_bytes(value_dim, q_PTHX.itemsize) // q_PTHX.itemsize
    return q_PTHX.new_empty((*q_PTHX.shape[:3], width))


def open_parts(parts_PTHY: Tensor) -> PartialOutputs:
    """Return views of rows: the averages [P, T, H, C] and log-sum-exp [P, T, H]."""
    tail = _TAIL_BYTES // parts_PTHY.itemsize
    lse_PTH = parts_PTHY.view(torch.float32)[..., -_TAIL_BYTES // 4]
    return PartialOutputs(parts_PTHY[..., :-tail], lse_PTH)
