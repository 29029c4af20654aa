"""A GPU that is not there: the way our programs go on one, on a machine that has none.

Tensors say that they lie on a GPU. Small ones hold their values in host memory, large ones hold
none, and what a kernel would have written stays as it was. Kernels may be compiled for Hopper, for
the very arguments they would be launched with. What does not go on a GPU is an error: tensors of
host and device in one operation, a launch that is too large, and for CUDA graphs what cannot be
captured, or memory that is gone when they are replayed.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.compile_only import stack_of

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
META = torch.device("meta")
# Tensors of more values hold none.
MOST_VALUES = 1 << 16
MOST_SHARED, MOST_PROGRAMS = 227 << 10, (2**31 - 1, 65535, 65535)
# Operations in which the host waits for values of the device.
ASKING = {
    *("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "argwhere", "bincount"),
    *("masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "histc"),
}
COPYING = {"copy_", "_to_copy", "to"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NotCapturable(RuntimeError):
    """The host waits for the device during a capture, which is then invalid."""


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU.

    Attributes:
        held: what there is of it: on the CPU, or on `meta` if it holds no values.
    """

    held: torch.Tensor
    device = CUDA
    is_cuda = True

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGpu":
        # For the code of torch that is in C++ it is on `meta`: no driver is asked.
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=META,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        """Return an address; memory is aligned as CUDA's allocator does."""
        storage = self.held.untyped_storage()._cdata << 9
        return storage + self.held.storage_offset() * self.held.element_size()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {key: value for key, value in kwargs.items() if not is_cuda(value)}
        args = tuple(value for value in args if not is_cuda(value))
        return super().to(*args, **kwargs) if args or kwargs else self

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, torch.Tensor):  # torch would make one on `meta`
            value = torch.full((), value, dtype=self.dtype, device=CUDA)
        super().__setitem__(index, value)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        return self.to(CPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: object) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]  # of a private argument
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no method of a class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return gpu.compute(func, args, kwargs or {})


class Gpu:
    """The one GPU.

    Attributes:
        capture: the graph in the making.
        waits: of the host for the device: where, and why; each how often.
        launches: of each kernel.
        compiled: by their digests, names, bytes of shared memory and of a thread's stack.
        replays: of CUDA graphs.
        recording: pools of memory that captures allocate from.
    """

    def __init__(self) -> None:
        self.capture: Any = None
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.compiled: dict[str, tuple[str, int, int]] = {}
        self.replays = 0
        self.recording: set[object] = set()
        self.pinned: set[int] = set()

    def wait(self, why: str) -> None:
        """Let the host wait, or do what a graph cannot hold for other reasons."""
        if self.capture is not None:
            self.capture.is_invalid = True
            raise NotCapturable(f"no CUDA graph can hold this: {why}")
        frame = sys._getframe(1)
        while frame.f_back and any(s in frame.f_code.co_filename for s in ("/torch/", "/dry_")):
            frame = frame.f_back
        self.waits[f"{Path(frame.f_code.co_filename).name} {frame.f_lineno}: {why}"] += 1

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of torch."""
        name = func._schema.name.removeprefix("aten::")
        names = [each.name for each in func._schema.arguments]
        if "device" in names[: len(args)]:
            at = names.index("device")
            kwargs = dict(zip(names[at:], args[at:], strict=False)) | kwargs
            args = args[:at]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        target = kwargs.get("device")
        if not ours and not is_cuda(target):
            return self._on_host(func, args, kwargs)
        host = [x for x in tensors if not isinstance(x, OnGpu)]
        self._check(name, args, kwargs, host, ours)
        result = self._values(func, name, args, dict(kwargs), ours)
        inputs = {id(x.held): x for x in ours}

        def place(x: torch.Tensor) -> torch.Tensor:
            if target is not None and not is_cuda(target):
                return _or_zeros(x.clone())
            if any(x is h for h in host):
                return OnGpu(x.clone()) if target is not None else x
            return inputs[id(x)] if id(x) in inputs else OnGpu(x)

        with torch.inference_mode(False):
            result = tree_map_only(torch.Tensor, place, result)
        if self.capture is not None:
            self.capture.add(ours, [x for x in tree_leaves(result) if isinstance(x, OnGpu)])
        return result

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_copy = "pin_memory" in func._schema.name
        if not is_copy and not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        self.wait("fresh pinned memory")
        result = args[0].clone() if is_copy else func(*args, **{**kwargs, "pin_memory": False})
        self.pinned.add(result.untyped_storage().data_ptr())
        return result

    def _check(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        host: list[torch.Tensor],
        ours: list[OnGpu],
    ) -> None:
        """Refuse operations that mix host and device, and record waits."""
        if name in ASKING:
            self.wait(name)
        target = kwargs.get("device")
        if name in COPYING and (host or (target is not None and not is_cuda(target))):
            is_pinned = any(x.untyped_storage().data_ptr() in self.pinned for x in host)
            is_free = True in (*args[2:3], kwargs.get("non_blocking"))
            if not is_free or not (is_pinned or (ours and self.capture is None)):
                self.wait(f"{name} between host and device")
        elif name in INDEXING:
            if host:
                self.wait(f"{name} with positions of the host")
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            if masks and not (name != "index" and args[2].numel() == 1):
                self.wait(f"{name} with a mask")
        else:
            assert not any(x.dim() for x in host), f"{name} of {ours} and of the host's {host}"

    def _values(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], ours: list[OnGpu]
    ) -> Any:
        """Compute with the held values; only shapes, where an argument has no values."""
        target = kwargs.pop("device", None)
        for key in ("pin_memory", "non_blocking"):
            kwargs.pop(key, None)
        has_values = not any(x.held.is_meta for x in ours)
        if "empty" in name or name in ("zeros", "ones", "full", "randn", "rand", "new_zeros"):
            return self._new(func, args, kwargs, bool(ours))
        device = {} if target is None else {"device": CPU if has_values else META}
        if name in ASKING and not has_values:
            args, kwargs = tree_map_only(OnGpu, lambda x: _or_zeros(x.held), (args, kwargs))
        elif has_values:
            args, kwargs = tree_map_only(OnGpu, lambda x: x.held, (args, kwargs))
        else:
            return self._shapes(func, name, args, kwargs | device)
        try:
            return func(*args, **kwargs, **device)
        except NotImplementedError:  # the operation runs on CUDA only: compute its shapes
            return self._shapes(func, name, args, kwargs)

    def _new(self, func: Any, args: Any, kwargs: dict[str, Any], is_like: bool) -> torch.Tensor:
        """Return a new tensor; unwritten values are 0."""
        shaped = tree_map_only(OnGpu, lambda x: _shape(x.held), args) if is_like else args
        made = func(*shaped, **kwargs, device=META)
        if made.numel() > MOST_VALUES:
            return made
        if not is_like and "empty" not in func._schema.name:
            return func(*args, **kwargs, device=CPU)
        return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype).zero_()

    def _shapes(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return results without values. Tensors changed in place keep their values."""
        first = args[0].held if args and isinstance(args[0], OnGpu) else args[0]
        if name == "copy_":
            torch.broadcast_shapes(args[0].shape, args[1].shape)
            return first
        if name in INDEXING:
            args = (args[0], [_positions(x) for x in args[1]], *args[2:])
        args, kwargs = tree_map_only(torch.Tensor, _shape, (args, kwargs))
        result = func(*args, **kwargs)
        return first if func._schema.is_mutable else result

    def launch(self, compiler: Callable[..., Any]) -> Callable[..., Any]:
        """Return what launches kernels, in the place of triton's `compiler` and launcher."""

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            name, values = kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            tensors = [v.base if isinstance(v, TensorDescriptor) else v for v in values.values()]
            tensors = [v for v in tensors if isinstance(v, torch.Tensor)]
            assert all(isinstance(v, OnGpu) for v in tensors), f"{name} is given host memory"
            sizes = grid(values) if callable(grid) else grid
            fits = all(0 < n <= most for n, most in zip(sizes, MOST_PROGRAMS, strict=False))
            assert fits, f"{name}: a grid of {sizes}"
            made = compiler(kernel, *args, grid=grid, warmup=True, **kwargs)
            if made.hash not in self.compiled:
                assert self.capture is None, f"{name} is compiled while a graph is captured"
                shared, stack = made.metadata.shared, stack_of(made.asm["cubin"]) if made.asm else 0
                assert shared <= MOST_SHARED, f"{name}: {shared} bytes of shared memory"
                self.compiled[made.hash] = name, shared, stack
            self.launches[name] += 1
            if self.capture is not None:
                self.capture.add(tensors, [])

        return run


def is_cuda(value: object) -> bool:
    """Return True for a device of ours; torch's C++ makes its tensors for ours on `meta`."""
    named = isinstance(value, str) and value.startswith("cuda")
    return named or (isinstance(value, torch.device) and value.type in ("cuda", "meta"))


def _or_zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x


def _shape(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that holds no values."""
    x = x.held if isinstance(x, OnGpu) else x
    if x.is_meta or not x.dim():
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def _positions(index: torch.Tensor | None) -> torch.Tensor | None:
    if index is None or index.dtype != torch.bool:
        return index
    return _or_zeros(index.held if isinstance(index, OnGpu) else index).nonzero()[:, 0]


gpu = Gpu()
