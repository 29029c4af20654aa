"""Triton where its kernels can run; elsewhere a stand-in that lets kernel files import.

Without a GPU, triton is imported only if TRITON_INTERPRET is set: the import takes a second, and
some versions complain of leaks when the program ends.

A kernel file imports `tl` and `triton` from here.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dsv3_kernels._gpu import Gpu, gpu_of


class _Absent:
    """Stand-in for a module: any attribute exists, any decorator returns the plain function."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


# Some machines have no triton wheels; the references run there.
HAS_TRITON = find_spec("triton") is not None and (
    torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ
)
triton: Any = import_module("triton") if HAS_TRITON else _Absent()
tl: Any = import_module("triton.language") if HAS_TRITON else _Absent()


# True if kernels are launched with programmatic dependent launch. Compiled into kernels, so it is
# set once, before the first launch.
_OVERLAPS = tl.constexpr(False)


def overlap_launches(device: torch.device) -> None:
    """Turn on programmatic dependent launch in this process: launches overlap running kernels.

    Must be called before any kernel is launched.

    Raises:
        ValueError: the device is no GPU of compute capability 9.0 or more.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise ValueError("overlapping launches need a GPU of compute capability 9.0 or more")
    compile_overlapping()


def compile_overlapping() -> None:
    """Compile kernels for overlapping launches in this process, whether it has a GPU or not."""
    global _OVERLAPS
    _OVERLAPS = tl.constexpr(True)


@triton.jit
def in_turn():
    """Wait for the preceding kernels to finish, then allow the next kernel's launch to begin.

    Every kernel calls it first. A kernel that reads another kernel's output has therefore waited
    for that kernel, and that kernel for its predecessors: overlapping launches do not change the
    order of memory accesses.
    """
    if _OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options() -> dict[str, bool]:
    """Return the launch options that all kernels share."""
    return {"launch_pdl": True} if _OVERLAPS.value else {}


def is_interpreted(x: Tensor) -> bool:
    """Return True if launches on `x` run in the interpreter.

    Its `tl.dot` multiplies the bits of bfloat16 as integers, so kernels convert to float32 first.
    """
    return gpu_of(x.device) is None


# Stands for a GPU in the interpreter: so small that a persistent program computes several tiles.
_INTERPRETER = Gpu(capability=(0, 0), multiprocessors=3, shared_bytes=228 << 10)


def launch_gpu(x: Tensor) -> Gpu:
    """Return the GPU that launches on `x` are chosen for."""
    return gpu_of(x.device) or _INTERPRETER


def has_tma(x: Tensor) -> bool:
    """Return True on devices that load tiles through TMA descriptors (Hopper and later)."""
    return launch_gpu(x).capability >= (9, 0)


def has_large_tma(x: Tensor) -> bool:
    """Return True on GPUs for data centers that have TMA, and shared memory for large tiles."""
    return launch_gpu(x).capability[0] in (9, 10)


def is_hopper(x: Tensor) -> bool:
    """Return True if `x` is on a GPU of compute capability 9."""
    return launch_gpu(x).capability[0] == 9
