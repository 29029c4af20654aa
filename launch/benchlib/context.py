"""Measure one attention layer at long contexts: dense beside sparse, time and bytes read.

    python launch/bench.py context --config v3.2-671b --lengths 4096 16384 65536
    python launch/bench.py context --heads 16 --batch 1 8 --chunk 256 --kv-dtype fp8

The layer has the model's shapes and random weights, its cache random entries. Dense attention runs
in the same layer: the indexer still writes its keys, but selects nothing. Bytes are those of
the cache entries and index keys in the page tables that attention and scoring were given.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchlib.context_layer import ContextLayer, LayerCost
from benchlib.flags import at_least
from benchlib.report import Report, Row
from benchlib.step_shape import StepKind
from common import tune_process
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.errors import ConfigError
from dsv3.settings import CacheDtype
from program import join_ranks


def context_report(
    config: ModelConfig,
    device: torch.device,
    steps: list[StepKind],
    cache: CacheDtype,
    index: CacheDtype,
    repeats: int,
) -> Report:
    """Measure every step in both forms.

    Args:
        config: the model; it has an indexer.
        device: device to measure on.
        steps: the steps; steps of one name make a curve.
        cache: format of the latents.
        index: format of the index keys.
        repeats: timed runs of each step and form.
    """
    layer = ContextLayer(config, device, cache, index, steps)
    report = Report("context", "context in tokens", "attention and index in ms")
    for step in steps:
        dense = layer.measure(step, is_sparse=False, repeats=repeats)
        sparse = layer.measure(step, is_sparse=True, repeats=repeats)
        report.rows += [_row(step, "dense", dense), _row(step, "sparse", sparse)]
        report.notes.append(_note(step, dense, sparse))
    for row in report.rows:
        curve = f"{row['step']}, {row['form']}"
        xs, ys = report.series.get(curve, ((), ()))
        milliseconds = row["attention ms"] + row["index ms"]
        report.series[curve] = (*xs, row["context"]), (*ys, milliseconds)
    report.setting = {
        "heads": config.num_attention_heads,
        "index_topk": config.index_topk,
        "cache": cache,
        "index keys": index,
    }
    return report


def _row(step: StepKind, form: str, cost: LayerCost) -> Row:
    return {
        "step": step.name,
        "context": step.length,
        "form": form,
        "layer ms": 1e3 * cost.layer,
        "attention ms": 1e3 * cost.attention,
        "index ms": 1e3 * cost.index,
        "attention MB read": cost.attention_bytes / 1e6,
        "index MB read": cost.index_bytes / 1e6,
    }


def _note(step: StepKind, dense: LayerCost, sparse: LayerCost) -> str:
    time = (dense.attention + dense.index) / (sparse.attention + sparse.index)
    read = (sparse.attention_bytes + sparse.index_bytes) / (dense.attention_bytes or 1)
    return (
        f"{step.name} at {step.length:,}: dense attention takes {time:.3g} times as long as sparse "
        f"with its index, which reads {read:.3g} times the bytes"
    )


def steps_of(args: argparse.Namespace) -> Iterator[StepKind]:
    """Yield the steps of the flags, by kind.

    Raises:
        ConfigError: a chunk is longer than a context.
    """
    for batch in args.batch:
        for length in args.lengths:
            yield StepKind(batch, length - 1, 1)
    for length in args.lengths if args.chunk else []:
        if args.chunk > length:
            raise ConfigError(f"--chunk={args.chunk} is longer than --lengths={length}")
        yield StepKind(1, length - args.chunk, args.chunk)


def config_of(args: argparse.Namespace) -> ModelConfig:
    """Return the model of the flags, with as many heads as they keep.

    Raises:
        ConfigError: it has no indexer, or fewer heads.
    """
    config = load_model_config(args.config)
    if not config.has_indexer:
        raise ConfigError(f"--config={args.config} has no indexer; name a model that has one")
    heads = args.heads or config.num_attention_heads
    if heads > config.num_attention_heads:
        raise ConfigError(
            f"--heads={heads}, but the model has {config.num_attention_heads}; use fewer"
        )
    return replace(config, num_attention_heads=heads, quantization=None)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--config", default="v3.2-671b", help="a preset's name or a config file")
    add(
        "--lengths",
        type=at_least(2),
        nargs="+",
        default=[4096, 16384, 65536],
        help="tokens of each sequence",
    )
    add("--batch", type=at_least(1), nargs="+", default=[1, 4], help="sequences that decode")
    add(
        "--chunk",
        type=at_least(0),
        default=64,
        help="new tokens of the last chunk of a prompt; 0 measures none",
    )
    add("--heads", type=at_least(1), help="attention heads to keep (default: all)")
    add("--kv-dtype", default="auto", choices=["auto", "fp8"], help="auto: as the activations")
    add("--index-dtype", default="auto", choices=["auto", "fp8"], help="auto: as the activations")
    add("--repeats", type=at_least(1), default=3, help="timed runs of each step and form")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=at_least(1), help="CPU threads (default: all)")


def run(args: argparse.Namespace) -> Report:
    """Measure the layer."""
    with join_ranks(args.device) as mesh:
        tune_process(mesh, args.threads)
        plain: CacheDtype = "fp32" if mesh.device.type == "cpu" else "bf16"
        report = context_report(
            config_of(args),
            mesh.device,
            list(steps_of(args)),
            cache=plain if args.kv_dtype == "auto" else args.kv_dtype,
            index=plain if args.index_dtype == "auto" else args.index_dtype,
            repeats=args.repeats,
        )
        report.setting["model"] = args.config
        return report
