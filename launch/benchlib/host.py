"""Host time of a step: scheduling and committing many sequences, without a model."""

import argparse
import time
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from benchlib.flags import at_least
from benchlib.launches import launch_time
from benchlib.report import Report
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.collectives import SingleRank
from dsv3.engine.engine import Engine
from dsv3.engine.locate import locate_description
from dsv3.engine.runner import BatchBuilder, Runner
from dsv3.engine.step_plan import PlanChannel, StepPlan
from dsv3.engine.step_result import StepResult
from dsv3.errors import ConfigError
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.request import Request, SamplingParams
from dsv3.settings import EngineConfig
from dsv3.text.tokenizer import Tokenizer
from program import engine_config

_CPU = torch.device("cpu")


class NoModel:
    """Runner that builds each batch, always samples token 7, and adds up its own time."""

    sent_bytes = 0

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout
        self.seconds = 0.0

    def run(self, plans: list[StepPlan]) -> StepResult:
        """Build the batch of the only dp group and return constant tokens."""
        start = time.perf_counter()
        (plan,) = plans
        BatchBuilder(plan, self._layout, _CPU, AbsorbRule(max_queries=1)).build()
        sampled = StepResult(torch.full((len(plan.row),), 7), None)
        self.seconds += time.perf_counter() - start
        return sampled


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--context", type=at_least(1), default=512, help="tokens of each prompt")
    add("--steps", type=at_least(1), default=200, help="timed steps")
    add("--text", action="store_true", help="also detokenize the answers")
    text = "time the Python code around an eager step's launches instead"
    add("--launches", action="store_true", help=text)


def run(args: argparse.Namespace) -> Report:
    """Time the host's share of steps; no model is loaded and no ranks are joined."""
    if args.tp or args.dp > 1:
        raise ConfigError("host runs no model, so there is no layout; leave --tp and --dp out")
    checkpoint = locate_description(args.ckpt_path)
    tokenizer = Tokenizer.load(checkpoint) if args.text else None
    config = load_model_config(args.config or checkpoint)
    if args.launches:
        return launch_time(config, args.context, args.steps)
    return host_time(config, engine_config(args), tokenizer, args.context, args.steps)


def host_time(
    config: ModelConfig,
    settings: EngineConfig,
    tokenizer: Tokenizer | None,
    context: int,
    steps: int,
) -> Report:
    """Time `steps` decode steps of `settings.max_running` sequences, none of which ends.

    Args:
        config: any model; its size does not matter.
        settings: `max_running` is the number of sequences.
        tokenizer: detokenizes the answers; None skips detokenization.
        context: tokens of each prompt.
        steps: number of timed steps.
    """
    count = settings.max_running
    layout = CacheLayout.make(config, "latent", "none", "fp32", 1, 0)
    planes = tuple(replace(plane, layers=(0,)) for plane in layout.planes)
    layout = replace(layout, planes=planes)
    num_pages = count * (layout.pages_for(context + steps + 2) + 1)
    cache = CachePool(layout, num_pages + 1, _CPU, SingleRank())
    runner = NoModel(layout)
    settings = replace(settings, max_batch_tokens=count * context)
    engine = Engine(
        config,
        settings,
        cast(Runner, runner),
        cache,
        PlanChannel(SingleRank()),
        tokenizer,
        context + steps + 2,
    )
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
    for i in range(count):
        prompt = rng.integers(0, config.vocab_size, context).tolist()
        engine.add(Request(request_id=str(i), prompt_ids=prompt, params=params))
    engine.step()  # prefills all prompts
    step_seconds: list[float] = []
    batch_seconds: list[float] = []
    for _ in range(steps):
        runner_before = runner.seconds
        start = time.perf_counter()
        engine.step()
        step_seconds.append(time.perf_counter() - start)
        batch_seconds.append(runner.seconds - runner_before)
    batch_ms = 1e3 * np.array(batch_seconds)
    host_ms = 1e3 * np.array(step_seconds) - batch_ms
    report = Report("host")
    for name, ms in (("planning and committing", host_ms), ("building batches", batch_ms)):
        p10, p50, p95 = np.percentile(ms, [10, 50, 95]).tolist()
        report.rows.append({"ms a step": name, "p10": p10, "median": p50, "p95": p95})
    report.notes.append(
        f"{count} sequences of {context} tokens and more, {steps} steps, "
        f"{'without' if tokenizer is None else 'with'} text"
    )
    return report
