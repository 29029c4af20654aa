"""Triton where it is installed; elsewhere a stand-in that lets kernel files import.

A kernel file says `from dsv3_kernels._triton import tl, triton, use_triton`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor


class _Absent:
    """Answers to any name and any decorator; a decorated function stays the plain function."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


HAS_TRITON = find_spec("triton") is not None  # no wheels for some machines: references serve there
triton: Any = import_module("triton") if HAS_TRITON else _Absent()
tl: Any = import_module("triton.language") if HAS_TRITON else _Absent()


def use_triton(x: Tensor) -> bool:
    """Return whether `x` lives where Triton's kernels run."""
    return HAS_TRITON and x.is_cuda
