"""Partial attention results as ranks send them to each other.

An average over some of the keys and its float32 log-sum-exp travel in one row: the values in the
activations' dtype, then 16 bytes that begin with the log-sum-exp, so that rows stay aligned.
"""

import torch
from torch import Tensor

_TAIL_BYTES = 16


def part_bytes(value_dim: int, itemsize: int) -> int:
    """Return the bytes of a row."""
    return value_dim * itemsize + _TAIL_BYTES


def empty_parts(q_PTHX: Tensor, value_dim: int) -> Tensor:
    """Return [P, T, H, Y] to be filled with what such queries get."""
    width = part_bytes(value_dim, q_PTHX.itemsize) // q_PTHX.itemsize
    return q_PTHX.new_empty((*q_PTHX.shape[:3], width))


def open_parts(parts_PTHY: Tensor) -> tuple[Tensor, Tensor]:
    """Return views: the averages [P, T, H, C], and their log-sum-exp [P, T, H] float32."""
    tail = _TAIL_BYTES // parts_PTHY.itemsize
    return parts_PTHY[..., :-tail], parts_PTHY.view(torch.float32)[..., -_TAIL_BYTES // 4]
