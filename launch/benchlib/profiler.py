"""Measured time of a step's operations: spans around modules and exchanges, each one's own time.

A span's own time is its whole time without the spans inside it, so the own times of a step add up
to the step. Spans are CUDA events on a GPU and the clock on a CPU. Nothing is hooked, and so
nothing costs anything, until a `Profiler` is attached.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import isabstract
from typing import Any

import torch
from torch import nn

from benchlib.step_shape import StepShape
from dsv3.engine.runner import Runner
from dsv3.model.moe import MoE
from dsv3.model.side_stream import SideStream

_LAYER = re.compile(r"^layers\.\d+(\.|$)")


@dataclass(slots=True)
class Measured:
    """Own time of all spans of one name."""

    seconds: float = 0.0
    count: int = 0


class Clock:
    """Moments of a device: events on a GPU, that of the host otherwise."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Return this moment."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until all moments have come."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two moments that have come."""
        return begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin


class Profiler:
    """Collects spans; `measured` holds them by name once their step has ended.

    Attributes:
        shapes: the steps' shapes, and the number of steps of each.
        steps: steps measured.
        step_seconds: their whole time.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._undo: list[Callable[[], object]] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self.measured: dict[str, Measured] = {}
        self.shapes: Counter[StepShape] = Counter()
        self.steps, self.step_seconds = 0, 0.0
        # Name, parent's index, begin, end.
        self._spans: list[tuple[str, int, Any, Any]] = []
        self._open: list[int] = []

    def begin(self, name: str, is_part: bool = False) -> None:
        """Open a span; one that is a part takes its parent's name in front."""
        parent = self._open[-1] if self._open else -1
        if is_part and parent >= 0:
            name = f"{self._spans[parent][0]}.{name}"
        self._open.append(len(self._spans))
        self._spans.append((name, parent, self._clock.mark(), None))

    def end(self) -> None:
        """Close the innermost span."""
        index = self._open.pop()
        self._spans[index] = (*self._spans[index][:3], self._clock.mark())

    @contextmanager
    def step(self, shape: StepShape) -> Iterator[None]:
        """Time a step and everything in it; waits for the device at its end."""
        self.begin("step")
        yield
        self.end()
        self._clock.settle()
        own: list[float] = []
        for _, parent, begin, end in self._spans:
            own.append(self._clock.seconds(begin, end))
            if parent >= 0:
                own[parent] -= own[-1]
        for (name, *_), seconds in zip(self._spans, own, strict=True):
            found = self.measured.setdefault(name, Measured())
            found.seconds += seconds
            found.count += 1
        self.shapes[shape] += 1
        self.steps += 1
        self.step_seconds += sum(own)
        self._spans.clear()

    def attach(self, model: nn.Module, *others: object) -> None:
        """Hook every module of a model, and every exchange that it and others may ask for.

        Modules are named by their path, without the layer's number; the feed-forward part of a
        layer with experts is called `moe`.
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
        """Set an attribute, until `detach`."""
        self._undo.append(partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def detach(self) -> None:
        """Take away what `attach` did."""
        while self._undo:
            self._undo.pop()()

    def wrap(
        self, name: str, function: Callable[..., Any], is_part: bool = False
    ) -> Callable[..., Any]:
        """Return a function whose calls are spans."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(name, is_part)
            result = function(*args, **kwargs)
            self.end()
            return result

        return timed


def profile(runner: Runner) -> Profiler:
    """Measure every step of a runner from now on, operation by operation; they run eagerly."""
    profiler = Profiler(runner.device)
    profiler.attach(runner.model, runner.sampler, runner.cache)
    runner.sampler = profiler.wrap("sampler", runner.sampler)
    for module in runner.model.modules():
        if isinstance(module, MoE):  # operations on a side stream have no time of their own
            profiler.replace(module, "side", SideStream(torch.device("cpu")))
    limit = runner.decode_limit
    runner.run_eagerly(lambda plan: profiler.step(StepShape.of_plan(plan, limit)))
    return profiler


class _Timed:
    """Somebody whose methods are spans: parts of the span that calls them."""

    def __init__(self, profiler: Profiler, inner: object) -> None:
        self._profiler, self._inner = profiler, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        owner = next((each for each in type(self._inner).__mro__ if name in vars(each)), None)
        if callable(value) and isabstract(owner):
            value = partial(vars(owner)[name], self)  # what it calls in turn is to be seen, too
        return self._profiler.wrap(name, value, is_part=True) if callable(value) else value
