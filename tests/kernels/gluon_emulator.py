"""Executes the source of a Gluon kernel without a GPU, as unkindly as the hardware may.

`load(source, seed)` executes a kernel file with this in place of Gluon. Tiles are torch tensors,
layouts are ignored; what happens in shared memory, and when, `gluon_machine.py` decides.
"""

import inspect
import itertools
import random
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon_machine import Machine, Pointer

CONSTANT = object()


class Emulated:
    """What `gluon.jit` makes of a function here: it can be called, and launched over a grid."""

    def __init__(self, function: Callable[..., Any], emulator: "Emulator") -> None:
        self.function, self.emulator = function, emulator

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int) -> None:
            assert num_warps == 4
            kinds = inspect.get_annotations(self.function)
            args = tuple(
                x if kinds.get(name) is CONSTANT else _argument(x)
                for name, x in zip(inspect.signature(self.function).parameters, args, strict=True)
            )
            for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
                seed = self.emulator.random.getrandbits(32)
                self.emulator.machine = Machine((x, y, z), grid, seed)
                self.function(*args)

        return launch


def _argument(x: Any) -> Any:
    """Return what a kernel gets of an argument that is no constant."""
    if isinstance(x, Tensor):
        return Pointer.to(x)
    small = isinstance(x, int) and abs(x) < 2**31
    dtype = torch.float32 if isinstance(x, float) else torch.int32 if small else torch.int64
    return torch.tensor(x, dtype=dtype)


class Emulator:
    """Stands in for the module `dsv3_kernels._gluon`."""

    HAS_GLUON = True

    def __init__(self, seed: int) -> None:
        self.machine = Machine((), (), 0)
        self.random = random.Random(seed)
        self.gluon = SimpleNamespace(jit=self._jit, constexpr_function=lambda f: f)

        def late(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: getattr(self.machine, name)(*args, **kwargs)

        self.copy_async, self.thread_barrier = late("copy_async"), late("thread_barrier")
        self.hopper = SimpleNamespace(
            mbarrier=SimpleNamespace(
                init=late("init"), wait=late("wait"), arrive=late("arrive"), MBarrierLayout=_layout
            ),
            async_copy=SimpleNamespace(
                mbarrier_arrive=late("arrive_after_copies"),
                commit_group=lambda: None,
                wait_group=late("wait_group"),
            ),
            fence_async_shared=late("fence"),
            warpgroup_mma=late("multiply"),
            warpgroup_mma_wait=late("wait_products"),
        )
        self.gl = SimpleNamespace(
            constexpr=CONSTANT,
            program_id=lambda i: torch.tensor(self.machine.program[i], dtype=torch.int32),
            num_programs=lambda i: self.machine.grid[i],
            allocate_shared_memory=late("allocate"),
            warp_specialize=late("specialize"),
            **_LANGUAGE,
        )

    def _jit(self, function: Any = None, **_: Any) -> Any:
        return Emulated(function, self) if function else lambda f: Emulated(f, self)


def _layout(*args: Any) -> None:
    return None


_LANGUAGE: dict[str, Any] = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "BlockedLayout": _layout,
    "SliceLayout": _layout,
    "NVMMADistributedLayout": _layout,
    "NVMMASharedLayout": SimpleNamespace(get_default_for=_layout),
    "SwizzledSharedLayout": _layout,
    "static_range": range,
    "arange": lambda a, b, layout: torch.arange(a, b, dtype=torch.int32),
    "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    "load": lambda at, mask=True, other=0: at.load(mask, other),
    "store": lambda at, value, mask=True: at.store(value, mask),
    "where": torch.where,
    "maximum": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "max": lambda x, axis: x.amax(axis),
    "sum": lambda x, axis: x.sum(axis),
    "exp2": torch.exp2,
    "log2": torch.log2,
    "cdiv": lambda a, b: -(-a // b),
}


def load(source: str, seed: int) -> dict[str, Any]:
    """Execute a kernel file whose Gluon is this machine; return its names."""
    names: dict[str, Any] = {"__name__": "emulated"}
    real = sys.modules.get("dsv3_kernels._gluon")
    stand_in: Any = ModuleType("dsv3_kernels._gluon")
    emulator = Emulator(seed)
    for name in ("HAS_GLUON", "gl", "gluon", "hopper", "copy_async", "thread_barrier"):
        setattr(stand_in, name, getattr(emulator, name))
    sys.modules["dsv3_kernels._gluon"] = stand_in
    try:
        exec(compile(source, "emulated", "exec"), names)
    finally:
        sys.modules["dsv3_kernels._gluon"] = real  # type: ignore[assignment]
    return names
