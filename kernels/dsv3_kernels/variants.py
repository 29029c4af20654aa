"""The variants of kernels that launches ask for: listed, and compiled ahead in other processes.

Triton compiles a kernel for each choice of its constants, and again where a number becomes 1 or
ceases to be a multiple of 16. `record_variants` collects these choices from launches on the meta
device, which have shapes and strides, but no values. `compile_variants` compiles them in processes
that do not touch the GPU and leaves the result in Triton's cache on disk, where launches find it.

The processes run this module: each reads one JSON line per variant, `[module, kernel,
specialization]`, and replies with one: `compiled`, `cached`, or the error.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from importlib import import_module
from queue import Empty, SimpleQueue
from threading import Lock
from types import SimpleNamespace
from typing import Any

from dsv3_kernels._gpu import Gpu, meta_stands_for
from dsv3_kernels._triton import compile_overlapping

COMPILED = "compiled"
CACHED = "cached"


@dataclass(frozen=True, slots=True, order=True)
class Variant:
    """A kernel for one choice of its constants and for some properties of its arguments.

    Attributes:
        module, kernel: names of the kernel's module and function.
        specialization: the choice, as JSON of Triton.
    """

    module: str
    kernel: str
    specialization: str

    def describe(self) -> str:
        """Return the kernel with its integer constants, for messages."""
        chosen = json.loads(self.specialization)
        return f"{self.kernel} {chosen['constant_vals']}"


class _NoDriver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, gpu: Gpu) -> None:
        from triton.backends.compiler import GPUTarget

        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> "_NoDriver":
        return self  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def record_variants(gpu: Gpu) -> Iterator[dict[Variant, None]]:
    """Collect the variants that launches with tensors on the meta device ask `gpu` for, in order.

    Nothing is compiled and nothing runs. No other kernels may be launched within the block.
    """
    from triton import knobs
    from triton.runtime import driver

    found: dict[Variant, None] = {}
    instead = _NoDriver(gpu)
    nothing = SimpleNamespace(
        function=None,
        packed_metadata=None,
        launch_metadata=lambda *_: None,
        run=lambda *_: None,
    )

    def record(*, fn: Any, key: Any, compile: dict[str, Any], **_: object) -> bool:
        found[Variant(fn.module, fn.name.rpartition(".")[2], compile["specialization_data"])] = None
        # Later launches of this variant find a kernel that does nothing.
        fn.jit_function.device_caches[instead][0][key] = nothing
        return True  # do not compile

    previous = driver.active
    hook = knobs.runtime.jit_cache_hook
    driver.set_active(instead)
    knobs.runtime.jit_cache_hook = record
    try:
        with meta_stands_for(gpu):
            yield found
    finally:
        knobs.runtime.jit_cache_hook = hook
        driver.set_active(previous)


class _Worker:
    """A process that compiles variants one by one; restarted if it dies."""

    def __init__(self, gpu: Gpu, overlap: bool) -> None:
        self._arguments = [str(number) for number in (*gpu.capability, int(overlap))]
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()
        self._has_ended = False

    def compile(self, variant: Variant) -> str:
        """Return the reply to a variant."""
        try:
            process = self._running()
        except OSError as error:
            return f"no process for compiling starts: {error}"
        assert process.stdin and process.stdout
        with suppress(OSError, ValueError):  # the process died, or `end` has closed its pipes
            process.stdin.write(json.dumps(astuple(variant)) + "\n")
            process.stdin.flush()
            if reply := process.stdout.readline().rstrip("\n"):
                return reply
        return f"the compiling process ended with {process.wait()}"

    def end(self) -> None:
        """End the process for good."""
        with self._lock:
            self._has_ended = True
            self._close()

    def _running(self) -> subprocess.Popen[str]:
        """Return the running process; start one if there is none."""
        with self._lock:
            if self._has_ended:
                raise InterruptedError("the work has ended")
            if self._process is None or self._process.poll() is not None:
                self._close()
                self._process = self._start()
            return self._process

    def _start(self) -> subprocess.Popen[str]:
        # Without a visible GPU, no CUDA context can be made.
        changed = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
        changed["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, "-m", __name__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | changed,
            text=True,
        )

    def _close(self) -> None:
        """End the process, if there is one, and close its pipes."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # flushing input that a dead process has not read
                    stream.close()


def compile_variants(
    variants: list[Variant],
    gpu: Gpu,
    overlap: bool,
    num_processes: int,
    done: Callable[[Variant, str], None],
) -> None:
    """Compile the variants that are not in Triton's cache, in `num_processes` other processes.

    If a process dies, its variant gets an error and a new process compiles the remaining ones.

    Args:
        variants: compiled in this order; the slowest should come first.
        gpu: the GPU to compile for.
        overlap: compile for overlapping launches.
        num_processes: processes that compile at the same time.
        done: called for every variant with `COMPILED`, `CACHED` or an error, from other threads.
    """
    left: SimpleQueue[Variant] = SimpleQueue()
    for variant in variants:
        left.put(variant)
    workers = [_Worker(gpu, overlap) for _ in range(min(num_processes, len(variants)))]

    def work(worker: _Worker) -> None:
        while True:
            try:
                variant = left.get_nowait()
            except Empty:
                return
            done(variant, worker.compile(variant))

    try:
        with ThreadPoolExecutor(max(1, len(workers))) as pool:
            try:
                for finished in [pool.submit(work, worker) for worker in workers]:
                    finished.result()
            except BaseException:  # threads that wait for a reply get none
                for worker in workers:
                    worker.end()
                raise
    finally:
        for worker in workers:
            worker.end()


def _reply(variant: Variant) -> str:
    """Compile a variant into the cache."""
    from triton import knobs

    was_cached: list[bool] = []

    def listen(*, cache_hit: bool, **_: object) -> None:
        was_cached.append(cache_hit)

    knobs.compilation.listener = listen
    try:
        kernel = getattr(import_module(variant.module), variant.kernel)
        kernel.preload(variant.specialization)
    except Exception as error:  # any type: the process goes on with other variants
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return CACHED if all(was_cached) else COMPILED


def main() -> None:
    """Compile the variants that standard input names."""
    from triton.runtime import driver

    major, minor, overlap = map(int, sys.argv[1:])
    if overlap:
        compile_overlapping()
    driver.set_active(_NoDriver(Gpu((major, minor), multiprocessors=0, shared_bytes=0)))
    # Libraries may print; only replies go to the standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(_reply(Variant(*json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
