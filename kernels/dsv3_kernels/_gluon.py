"""Gluon, Triton's language of warp groups and barriers, under one name whatever Triton calls it.

It is experimental and renames things: only this file knows how. Where there is none, kernel files
import all the same; their kernels are then plain functions that nobody launches.
"""

from importlib import import_module
from typing import Any

from dsv3_kernels._triton import HAS_TRITON, _Absent, triton

# Triton 3.5 specializes warps by other arguments.
HAS_GLUON = HAS_TRITON and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def _find(name: str) -> Any:
    return import_module(f"triton.experimental.gluon{name}") if HAS_GLUON else _Absent()


gluon, gl, hopper = _find(""), _find(".language"), _find(".language.nvidia.hopper")
# Called `barrier` from 3.7 on.
thread_barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier
# Called `async_load` in 3.9.
_copy = hopper.async_copy
copy_async: Any = getattr(_copy, "async_load", None) or _copy.async_copy_global_to_shared
