"""Copies from the host to the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes: kernels load vectors


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return host values on the device, without waiting for the device's earlier work."""
    return all_to_device([values], device)[0]


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Return several host arrays on the device, after one copy from one pinned block."""
    if device.type != "cuda":
        tensors = [torch.from_numpy(values) for values in arrays]
        return tensors if device.type == "cpu" else [x.to(device) for x in tensors]
    ends = np.cumsum([-(-values.nbytes // _ALIGNMENT) * _ALIGNMENT for values in arrays])
    starts = [0, *ends[:-1].tolist()]
    block = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=True)
    for start, values in zip(starts, arrays, strict=True):
        block.numpy()[start : start + values.nbytes].view(values.dtype)[:] = values.ravel()
    sent = block.to(device, non_blocking=True)
    return [
        sent[start : start + values.nbytes].view(torch.from_numpy(values).dtype).view(values.shape)
        for start, values in zip(starts, arrays, strict=True)
    ]
