"""The GPU that a tensor is on, and the padded sizes that launches are chosen by."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """The properties of a GPU that launches depend on.

    Attributes:
        capability: compute capability.
        multiprocessors: number of multiprocessors.
        shared_bytes: shared memory of each, in bytes.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int


# The GPU that tensors on the meta device stand for, while launches are recorded.
_STANDS_FOR: list[Gpu] = []


@cache
def _properties(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(
        capability=torch.cuda.get_device_capability(device),
        multiprocessors=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_multiprocessor,
    )


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the GPU `device`; None for a CPU, where kernels are interpreted.

    The driver is queried once per GPU.
    """
    if device.type == "cuda":
        return _properties(device)
    return _STANDS_FOR[-1] if _STANDS_FOR and device.type == "meta" else None


@contextmanager
def meta_stands_for(gpu: Gpu) -> Iterator[None]:
    """Let launches with tensors on the meta device be those on `gpu` within the block."""
    _STANDS_FOR.append(gpu)
    try:
        yield
    finally:
        _STANDS_FOR.pop()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own makes six Python calls, at every launch."""
    return -(-a // b)


def next_power_of_2(count: int) -> int:
    """Return the smallest power of two of at least `count`; 1 for 0."""
    return 1 << max(0, count - 1).bit_length()


@cache
def row_bucket(count: int) -> int:
    """Return the padded number of rows: at most a quarter more than `count`, or three more.

    Launches are chosen by padded numbers, so that the kernels' variants can be listed.
    """
    if count <= 2:
        return count
    step = max(4, next_power_of_2(count) // 8)
    return cdiv(count, step) * step


def row_buckets(most: int) -> list[int]:
    """Return the padded numbers of 1 .. `most` rows, in order."""
    buckets = [1]
    while buckets[-1] < most:
        buckets.append(row_bucket(buckets[-1] + 1))
    return buckets
