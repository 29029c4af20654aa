"""Measure one rank's exact share of a large model on one device, with random weights.

    python launch/bench.py rank --config v3-671b --world 8 --layers 4 --batch 1 8 128 --context 1024
    python launch/bench.py rank --config v3-671b --world 8 --layers all --prefill 4096 --no-comm

The heads, experts and cache shard of rank r of w are allocated on the device and run by the runner
that serves requests; collectives are local stand-ins. So the time of a step is that of the rank
without its links.
"""

import argparse
import logging
from pathlib import Path

import torch

from benchlib.case_log import CaseLog, describe, spoils_device
from benchlib.flags import at_least
from benchlib.hardware import Hardware, hardware
from benchlib.rank_formats import formats_report
from benchlib.rank_share import Rank, RankShape
from benchlib.rank_steps import measure_step
from benchlib.report import Report, Row
from benchlib.step_shape import StepKind
from common import tune_process
from dsv3.config_files import load_model_config
from dsv3.engine.start import set_launches
from dsv3.errors import ConfigError
from dsv3.settings import CacheDtype
from program import join_ranks

_log = logging.getLogger("dsv3")


def rank_report(
    shape: RankShape,
    device: torch.device,
    ceilings: Hardware,
    batches: list[int],
    context: int,
    prefill: int,
    steps: int,
    eager: bool = False,
    log: CaseLog | None = None,
) -> Report:
    """Measure decode steps of several batch sizes, and one prefill step.

    A step that raises is a failure of the report, which has the other steps. After an error that
    leaves the GPU unusable it has the steps before it.

    Args:
        shape: the share.
        device: device to allocate it on.
        ceilings: peak rates of the device.
        batches: sequences of the decode steps.
        context: cached tokens of each sequence.
        prefill: tokens of a prompt; 0 measures none.
        steps: timed steps of each kind.
        eager: run without CUDA graphs.
        log: gets each step as it is measured, and has the steps that are not measured again.
    """
    page = 2 * max(64, shape.world)
    rank = Rank(shape, device, max([b * (context + page) for b in batches] + [prefill + page]))
    report = Report("rank", setting=_setting(rank, ceilings))
    kinds = {f"decode {b} at {context}": StepKind(b, context, 1) for b in batches}
    if prefill:
        kinds[f"prefill {prefill}"] = StepKind(1, 0, prefill)
    log = log or CaseLog(None)
    for name, kind in kinds.items():
        if name in log.begun:
            report.notes.append(f"{name} is in --rows and was not measured")
            continue
        _log.info("%s", name)
        log.begin(name)
        try:
            result = measure_step(rank, name, kind, ceilings, steps, eager)
        except Exception as error:  # Triton's compilers and drivers raise errors of many kinds
            _log.debug("%s", name, exc_info=True)
            why = describe(error)
            log.end(name, why)
            report.failures.append(f"{name}: {why}")
            if spoils_device(why):
                report.notes.append("after this error the process cannot use the GPU: stopped")
                break
            continue
        log.end(name, figures=result.figures | {"kernel table": result.kernels})
        report.rows += result.rows
        report.notes += result.notes
        if result.kernels:
            report.tables[f"kernels of a step, {name}"] = result.kernels
    return report


def _setting(rank: Rank, ceilings: Hardware) -> Row:
    shape = rank.shape
    model_gib = rank.model.num_bytes / 2**30
    cache_gib = rank.cache.num_bytes / 2**30
    return {
        "rank": f"{shape.rank} of {shape.world}",
        "layers": rank.config.num_hidden_layers,
        "weights": f"{shape.weights} {model_gib:.4g} GiB",
        "cache": f"{shape.cache} {cache_gib:.4g} GiB, {shape.kv_shard}",
        "exchanges": "moved locally" if shape.moves else "left out",
        "ceilings": ceilings.name,
    }


def shape_of(args: argparse.Namespace, given: str, on_cpu: bool) -> RankShape:
    """Return the share that the flags select, with weights in the given format."""
    config = load_model_config(args.config)
    if not 0 <= args.rank < args.world:
        raise ConfigError(f"--rank={args.rank} is not in 0..{args.world - 1}")
    if args.layers != "all" and not args.layers.isdecimal():
        raise ConfigError(f"--layers={args.layers} is neither a number nor all")
    plain: CacheDtype = "fp32" if on_cpu else "bf16"
    weights = plain if config.quantization is None else "fp8"
    return RankShape(
        config=config,
        world=args.world,
        rank=args.rank,
        layers=0 if args.layers == "all" else int(args.layers),
        weights=weights if given == "auto" else given,
        cache=plain if args.kv_dtype == "auto" else args.kv_dtype,
        kv_shard=args.kv_shard,
        moves=not args.no_comm,
        seed=args.seed,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--config", default="v3-671b", help="a preset's name or a config file")
    add("--world", type=at_least(1), default=8, help="number of ranks")
    add("--rank", type=int, default=0, help="rank to measure (default: 0)")
    add("--layers", default="4", help="N: one dense and N - 1 MoE layers; or all")
    text = "sequences of a decode step"
    add("--batch", type=at_least(1), nargs="+", default=[1, 8, 128], help=text)
    add("--context", type=at_least(1), default=1024, help="cached tokens of each sequence")
    text = "also measure a prompt of N tokens (default: none)"
    add("--prefill", type=int, default=0, metavar="N", help=text)
    text = "format of the weights; auto is the stored format; several on a CPU: steps in turns"
    formats = ["auto", "fp8", "int8", "int4", "bf16", "fp32"]
    add("--weights", nargs="+", default=["auto"], choices=formats, help=text)
    text = "format of the cache; auto is bf16, on a CPU fp32"
    add("--kv-dtype", default="auto", choices=["auto", "fp8", "bf16", "fp32"], help=text)
    text = "split the cache's positions over tp, or replicate them"
    add("--kv-shard", default="none", choices=["none", "tokens"], help=text)
    add("--no-comm", action="store_true", help="skip exchanges")
    add("--steps", type=at_least(1), default=20, help="timed steps of each kind")
    add("--seed", type=int, default=0, help="of the random weights (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda")
    text = "ceilings: measure (on this device), or the name of a device, such as h100"
    add("--hardware", default="measure", help=text)
    add("--enforce-eager", action="store_true", help="run without CUDA graphs")
    text = "launch each kernel before the previous one ends"
    add("--overlap-launches", action="store_true", help=text)
    text = "file to write each step to, as it is measured; its steps are not measured again"
    add("--rows", type=Path, help=text)
    add("--threads", type=at_least(1), help="CPU threads (default: all)")


def run(args: argparse.Namespace) -> Report:
    """Allocate the share, and measure its steps."""
    log = CaseLog(args.rows, "--rows")
    with join_ranks(args.device) as mesh:
        tune_process(mesh, args.threads)
        set_launches(args.overlap_launches, mesh.device, "--overlap-launches")
        on_cpu = mesh.device.type == "cpu"
        shape, *others = (shape_of(args, weights, on_cpu) for weights in args.weights)
        if others:
            if not on_cpu or args.prefill or args.rows:
                raise ConfigError(
                    "--weights with several formats measures decode steps of a CPU; "
                    "without --device cpu, with --prefill or --rows give one format"
                )
            shapes = [shape, *others]
            report = formats_report(shapes, mesh.device, args.batch, args.context, args.steps)
        else:
            report = rank_report(
                shape,
                mesh.device,
                hardware(args.hardware, mesh.device, fp32=shape.weights == "fp32"),
                batches=args.batch,
                context=args.context,
                prefill=args.prefill,
                steps=args.steps,
                eager=args.enforce_eager,
                log=log,
            )
        report.setting["overlapping launches"] = args.overlap_launches
        return report
