"""Measure the time of an operation, and the bandwidth and FLOP ceilings of a device.

On a GPU, a time is the median over replays of a CUDA graph with many calls on rotated operands:
operands that stream from memory are not in the L2 cache, and launches cost as much as in a served
graph. On a CPU, a time is the median of single calls.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchlib.table import Row
from dsv3_kernels.fp8_format import FP8

# Six times the L2 cache of an H100.
ROTATED_BYTES = 300 << 20
_CALLS = 64
_REPLAYS = 11
_NAME_LENGTH = 80
_LEAST_REPLAYS = 3
# Seconds of a ceiling's measurement, so that all of a device take less than two.
_CEILING_SECONDS = 0.25


def median_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, budget: float | None = None
) -> float:
    """Return the median seconds of a call; all calls do the same work on different memory.

    Args:
        calls: the calls.
        device: device that runs them.
        budget: seconds that the timed calls may take together; long calls are timed less often.
            None always runs the same number of calls, as a collective needs.
    """
    if device.type == "cuda":
        return _median_on_gpu(calls, budget)
    for call in calls:
        call()
    seconds: list[float] = []
    while len(seconds) < _REPLAYS:
        begin = time.perf_counter()
        for call in calls:
            call()
        seconds.append((time.perf_counter() - begin) / len(calls))
        is_long = budget is not None and sum(seconds) * len(calls) > budget
        if is_long and len(seconds) >= _LEAST_REPLAYS:
            break
    return statistics.median(seconds)


def _median_on_gpu(calls: Sequence[Callable[[], object]], budget: float | None) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and other work of a first call
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = max(1, _CALLS // len(calls))
    if budget is not None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        seconds_of_round = begin.elapsed_time(end) / 1e3
        rounds = max(1, min(rounds, int(budget / _REPLAYS / max(seconds_of_round, 1e-9))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    seconds = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return statistics.median(seconds)


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """A kernel or copy that a GPU ran; begin and end in seconds."""

    name: str
    begin: float
    end: float


def kernel_events(run: Callable[[], object]) -> list[KernelEvent]:
    """Return the kernels and copies that a call runs on a GPU."""
    profiler = torch.profiler
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return [
        KernelEvent(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6)
        for e in trace.events()
        if e.device_type.name == "CUDA"
    ]


def kernel_table(events: Sequence[KernelEvent]) -> list[Row]:
    """Return a row for each kernel, the one with the longest time first."""
    times: dict[str, list[float]] = {}
    for event in events:
        name = event.name.split("(")[0][:_NAME_LENGTH]  # without the types of C++ arguments
        times.setdefault(name, []).append(event.end - event.begin)
    total = sum(map(sum, times.values()))
    return [
        {
            "kernel": name,
            "launches": len(seconds),
            "us each": 1e6 * statistics.fmean(seconds),
            "us": 1e6 * sum(seconds),
            "share %": 100 * sum(seconds) / max(total, 1e-12),
        }
        for name, seconds in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]


def busy_and_idle(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the time covered by at least one interval, and the time of the gaps between them."""
    if not intervals:
        return 0.0, 0.0
    busy = 0.0
    end = -float("inf")
    for first, last in sorted(intervals):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy, end - min(first for first, _ in intervals) - busy


def copies_needed(num_bytes: float) -> int:
    """Return the number of operand sets of `num_bytes` each that exceed the L2 cache."""
    return max(2, min(_CALLS, -int(-ROTATED_BYTES // max(num_bytes, 1))))


def read_bandwidth(device: torch.device) -> float:
    """Return the read bandwidth of memory in bytes per second, from a sum larger than any cache."""
    size = ROTATED_BYTES if device.type == "cpu" else 8 * ROTATED_BYTES
    data = torch.zeros(size // 4, device=device)
    return size / median_seconds([lambda: data.sum()], device, _CEILING_SECONDS)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of a large matrix product; FP8 uses `torch._scaled_mm`."""
    size = 1024 if device.type == "cpu" else 8192
    one = torch.ones((), device=device)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    def product() -> Tensor:
        if dtype != FP8:
            return F.linear(a, b)
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2.0 * size**3 / median_seconds([product], device, _CEILING_SECONDS)
