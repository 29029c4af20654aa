"""Measure a step's operations: spans around modules and collectives, and each span's own time.

A span's own time excludes the spans inside it, so the own times of a step add up to the step.
Spans are timed with CUDA events on a GPU and with the host's clock on a CPU. Without an attached
`Profiler`, there are no hooks and no cost.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchlib.step_shape import StepShape
from dsv3.distributed.collectives import Collectives
from dsv3.engine.runner import Runner
from dsv3.model.moe import MoE
from dsv3.model.side_stream import SideStream

# Keeps a GPU busy while the host launches a step.
_HOLD_CYCLES = 200_000_000
_LAYER = re.compile(r"^layers\.\d+(\.|$)")


@dataclass(slots=True)
class SpanTotal:
    """Own time and number of all spans of one name."""

    seconds: float = 0.0
    count: int = 0


@dataclass(slots=True)
class _Span:
    """One timed interval; `parent` is the index of the span around it, -1 for none."""

    name: str
    parent: int
    begin: Any
    end: Any = None


class Clock:
    """Timestamps of a device: CUDA events on a GPU, otherwise the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Return a timestamp."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has passed all timestamps."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two timestamps, after `wait`."""
        return begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin


def hold(device: torch.device) -> None:
    """Let a GPU wait while the host launches a step, so that events show the device's time."""
    if device.type == "cuda":
        torch.cuda._sleep(_HOLD_CYCLES)


class Profiler:
    """Collector of spans; at the end of a step, they are added to `measured` by name.

    Attributes:
        measured: own time of the spans of each name.
        shapes: number of steps of each shape.
        steps: number of measured steps.
        step_seconds: total seconds of the measured steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._undo: list[Callable[[], object]] = []
        self.clear()

    def clear(self) -> None:
        """Discard all measurements."""
        self.measured: dict[str, SpanTotal] = {}
        self.shapes: Counter[StepShape] = Counter()
        self.steps = 0
        self.step_seconds = 0.0
        self._spans: list[_Span] = []
        self._open: list[int] = []

    def begin(self, name: str, is_part: bool = False) -> None:
        """Open a span; with `is_part`, its name gets the parent's name as a prefix."""
        parent = self._open[-1] if self._open else -1
        if is_part and parent >= 0:
            name = f"{self._spans[parent].name}.{name}"
        self._open.append(len(self._spans))
        self._spans.append(_Span(name, parent, self._clock.mark()))

    def end(self) -> None:
        """Close the innermost span."""
        self._spans[self._open.pop()].end = self._clock.mark()

    @contextmanager
    def step(self, shape: StepShape) -> Iterator[None]:
        """Time a step and all spans in it; at its end, wait for the device."""
        self.begin("step")
        yield
        self.end()
        self._clock.wait()
        own_seconds: list[float] = []
        for span in self._spans:
            own_seconds.append(self._clock.seconds(span.begin, span.end))
            if span.parent >= 0:
                own_seconds[span.parent] -= own_seconds[-1]
        for span, seconds in zip(self._spans, own_seconds, strict=True):
            total = self.measured.setdefault(span.name, SpanTotal())
            total.seconds += seconds
            total.count += 1
        self.shapes[shape] += 1
        self.steps += 1
        self.step_seconds += sum(own_seconds)
        self._spans.clear()

    def attach(self, model: nn.Module, *others: object) -> None:
        """Hook every module of a model, and the collectives that modules and `others` hold.

        Modules are named by their path without the layer's number; `mlp` of a layer with experts
        is named `moe`.
        """
        for path, module in model.named_modules():
            name = _LAYER.sub("", path) or ("layers" if path else "model")
            if hasattr(model.get_submodule(".".join(path.split(".")[:3])), "router"):
                name = re.sub(r"^mlp\b", "moe", name)
            begin = module.register_forward_pre_hook(lambda _m, _x, name=name: self.begin(name))
            end = module.register_forward_hook(lambda *_: self.end())
            self._undo += [begin.remove, end.remove]
        for owner in (*model.modules(), *others):
            for key, value in list(vars(owner).items()):
                if hasattr(value, "all_reduce"):
                    self.replace(owner, key, _Timed(self, value))

    def replace(self, owner: object, name: str, value: object) -> None:
        """Replace an attribute until `detach`."""
        self._undo.append(partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def detach(self) -> None:
        """Remove all hooks and restore all replaced attributes."""
        while self._undo:
            self._undo.pop()()

    def wrap(
        self, name: str, function: Callable[..., Any], is_part: bool = False
    ) -> Callable[..., Any]:
        """Return the function with each call recorded as a span."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(name, is_part)
            result = function(*args, **kwargs)
            self.end()
            return result

        return timed


def profile(runner: Runner) -> Profiler:
    """Attach a profiler to a runner; from now on its steps run eagerly and are measured."""
    profiler = Profiler(runner.device)
    profiler.attach(runner.model, runner.sampler, runner.cache)
    runner.sampler = profiler.wrap("sampler", runner.sampler)
    for module in runner.model.modules():
        if isinstance(module, MoE):  # overlapping operations on a side stream cannot be timed
            profiler.replace(module, "side", SideStream(torch.device("cpu")))
    limit = runner.rule.max_queries
    runner.run_eagerly(lambda plan: profiler.step(StepShape.of_plan(plan, limit)))
    return profiler


class _Timed:
    """Proxy that records every method call as a child span of the caller."""

    def __init__(self, profiler: Profiler, inner: object) -> None:
        self._profiler = profiler
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        owner = next((base for base in type(self._inner).__mro__ if name in vars(base)), None)
        if callable(value) and owner is Collectives:
            value = partial(vars(owner)[name], self)  # so that its calls are recorded, too
        return self._profiler.wrap(name, value, is_part=True) if callable(value) else value
