"""`torch.cuda` and Triton's driver for a pretended GPU: graphs, streams, events, properties."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.compile_only import NoDevice
from tests.kernels.dry_gpu import CPU, CUDA, Gpu, OnGpu, gpu, is_cuda


class Graph:
    """A CUDA graph. Tensors that it uses and did not allocate must live as long as it does."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._used: dict[int, tuple[StorageWeakRef, str]] = {}
        self._made: dict[int, torch.UntypedStorage] = {}
        self._size = 0
        self._pool: object = None
        self.is_invalid = False

    def capture_begin(self, pool: object = None, **_: Any) -> None:
        assert gpu.capture is None, "captures do not nest"
        assert pool not in gpu.recording, f"{pool} is being recorded to"
        gpu.capture, self._pool = self, pool
        gpu.recording.add(pool)

    def capture_end(self) -> None:
        """Forget the memory that was made: it stays the graph's.

        The end of an invalid capture raises, and leaves its pool as torch does.
        """
        gpu.capture = None
        self._made.clear()
        if self.is_invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        end_pool(0, self._pool)

    def add(self, inputs: list[Any], results: list[OnGpu]) -> None:
        self._size += 1
        for x in inputs:
            storage = x.held.untyped_storage()
            if storage._cdata not in self._made:
                self._used.setdefault(storage._cdata, (StorageWeakRef(storage), repr(x)))
        known = {x.held.untyped_storage()._cdata for x in inputs}
        made = {x.held.untyped_storage()._cdata: x.held.untyped_storage() for x in results}
        self._made |= {key: storage for key, storage in made.items() if key not in known}

    def replay(self) -> None:
        gone = [name for storage, name in self._used.values() if storage.expired()]
        assert self._size and not gone, f"a graph of {self._size} operations; freed: {gone}"
        gpu.replays += 1


def end_pool(_: int, pool: object) -> None:
    """Stop allocating from a pool."""
    if pool not in gpu.recording:
        raise RuntimeError("not recording")
    gpu.recording.remove(pool)


class Stream:
    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = CUDA

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)

    def record_event(self) -> "Event":
        event = Event()
        event.record()
        return event

    def synchronize(self) -> None:
        gpu.wait("Stream.synchronize")

    def query(self) -> bool:
        gpu.wait("Stream.query")
        return True


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._is_timed, self._at = enable_timing, 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        gpu.wait("Event.synchronize")

    def elapsed_time(self, other: "Event") -> float:
        assert self._is_timed and other._is_timed and self._at and other._at, "no times"
        return 1e3 * (other._at - self._at)


class Everywhere(TorchDispatchMode):
    """Sends to the GPU what makes new tensors there, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return gpu.compute(func, args, kwargs or {})


def _answers() -> dict[str, Any]:
    """Return what `torch.cuda` would ask a driver for."""
    current = [Stream()]

    class OnStream:
        """Like torch's, not left if the end of a capture raises."""

        def __init__(self, chosen: Stream) -> None:
            self._chosen = chosen

        def __enter__(self) -> None:
            self._before, current[0] = current[0], self._chosen

        def __exit__(self, *_: object) -> None:
            current[0] = self._before

    facts = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)
    return {
        **{name: lambda *_, **__: None for name in ("_lazy_init", "_lazy_call", "set_device")},
        **{name: lambda *_: None for name in ("reset_peak_memory_stats", "_sleep")},
        **{name: lambda *_: 1 << 30 for name in ("memory_allocated", "max_memory_allocated")},
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: gpu.capture is not None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda _=None: "a GPU that is not there",
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": lambda _=None: facts,
        "mem_get_info": lambda _=None: (79 << 30, 80 << 30),
        "current_stream": lambda _=None: current[0],
        "set_stream": lambda chosen: current.__setitem__(0, chosen),
        "stream": OnStream,
        "synchronize": lambda _=None: gpu.wait("synchronize"),
        "empty_cache": lambda: gpu.wait("empty_cache"),
        "graph_pool_handle": lambda: (0, 1),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }


def _not_compiled(_: JITFunction, key: object, *__: object) -> SimpleNamespace:
    """Stand for what would have been compiled for arguments of this kind."""
    return SimpleNamespace(hash=key, metadata=SimpleNamespace(shared=0), asm=None)


@contextmanager
def dry_gpu(compiles: bool = True) -> Iterator[Gpu]:
    """Let torch and triton find a GPU."""
    make = torch.tensor
    move = torch.Tensor.to
    start = threading.Thread.run
    mode, graph = Everywhere(), torch.cuda.graph

    def tensor(data: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return make(data, **kwargs).to(CPU if device is None else device)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {key: CUDA if is_cuda(value) else value for key, value in kwargs.items()}
        moved: Any = (CUDA if is_cuda(value) else value for value in args)
        return move(self, *moved, **kwargs)

    def run(self: threading.Thread) -> None:
        with mode:
            start(self)

    with ExitStack() as stack:
        for name, answer in _answers().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(torch.cuda.graphs, name):
                stack.enter_context(mock.patch.object(torch.cuda.graphs, name, answer))
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", create=True))
        ending = mock.patch.object(torch._C, "_cuda_endAllocateToPool", end_pool, create=True)
        stack.enter_context(ending)
        stack.enter_context(mock.patch.object(graph, "default_capture_stream", None))
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", to))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda x: x.to(CUDA)))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run))
        stack.enter_context(mock.patch.object(JITFunction, "run", gpu.launch(JITFunction.run)))
        if not compiles:
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", _not_compiled))
        stack.enter_context(mock.patch.object(driver, "_active", NoDevice(90)))
        stack.enter_context(mode)
        yield gpu
