"""Host time of a step that runs eagerly: the Python around its launches, without a GPU."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from cProfile import Profile
from importlib import import_module
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from benchlib.rank_share import Rank, RankShape
from benchlib.report import Report
from benchlib.step_shape import StepKind
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.model.absorb_rule import absorb_limit
from dsv3_kernels import operation
from dsv3_kernels._triton import HAS_TRITON

_META = torch.device("meta")
_RANKS = 8  # at most
_FEW_LAYERS = 2
_MANY_LAYERS = 6


def launch_time(config: ModelConfig, context: int, steps: int) -> Report:
    """Time a layer in eager steps of one of several ranks.

    Tensors are on torch's meta device, which computes nothing, and no kernel is launched: neither
    Triton's launcher nor the driver count.

    Args:
        config: of the model; two layers are compared with six.
        context: cached tokens of the sequences that decode.
        steps: number of timed steps of each kind; the fastest one counts.
    """
    if not HAS_TRITON:
        raise ConfigError("--launches needs Triton; without a GPU, set TRITON_INTERPRET=0")
    limit = absorb_limit(config)
    report = Report("launches")
    for name, step in {
        "decode 8": StepKind(8, context, 1),
        f"prompt of {limit}, absorbed": StepKind(1, 0, limit),
        f"prompt of {limit + 1}, expanded": StepKind(1, 0, limit + 1),
    }.items():
        few, many = (_cost(config, n, step, steps) for n in (_FEW_LAYERS, _MANY_LAYERS))
        seconds, launched, calls = ((many - few) / (_MANY_LAYERS - _FEW_LAYERS)).tolist()
        report.rows.append(
            {
                "eager step": name,
                "launches a layer": launched,
                "calls a layer": calls,
                "us a layer": 1e6 * seconds,
            }
        )
    report.notes.append(
        "calls of functions, and CPU time, of the Python code; no kernel is launched, no tensor "
        "computed"
    )
    return report


def _cost(config: ModelConfig, layers: int, step: StepKind, steps: int) -> NDArray[np.float64]:
    """Return the CPU seconds of the fastest step, its launches, and its calls of functions."""
    world = math.gcd(_RANKS, config.num_attention_heads)
    weights = "bf16" if config.quantization is None else "fp8"
    share = RankShape(config=config, world=world, layers=layers, weights=weights, moves=False)
    seconds = []
    with _no_launches() as launched:
        rank = Rank(share, _META, step.batch * (step.length + 2 * 64 * world))
        runner = rank.new_runner(eager=True)
        for _ in range(steps):
            plan = rank.plan(step)
            begin = time.process_time()
            runner.run([plan])
            seconds.append(time.process_time() - begin)
        launched.clear()
        counter = Profile()
        counter.runcall(runner.run, [plan])
        calls = sum(entry.callcount for entry in counter.getstats())
    return np.array([min(seconds), len(launched), calls])


@contextmanager
def _no_launches() -> Iterator[list[object]]:
    """Run the kernels' host code on any device; collect their launches, and do nothing else."""
    launched: list[object] = []

    def launch(kernel: object, *_: object, **__: object) -> None:
        launched.append(kernel)

    def always(_: object) -> bool:
        return True

    jit = import_module("triton.runtime.jit")
    interpreter = "triton.runtime.interpreter"
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(jit.JITFunction, "run", launch),
            mock.patch.object(import_module(interpreter).GridExecutor, "__call__", launch),
            mock.patch.object(operation, "use_triton", always),
        ):
            stack.enter_context(patch)
        yield launched
