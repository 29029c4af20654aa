"""Measure the engine: throughput, dialogues, the host's share of a step, the cache, experts.

    torchrun --nproc-per-node 2 launch/bench.py throughput --requests 64
    python launch/bench.py throughput --requests 64 --threads 1 --peer transformers
    python launch/bench.py chat --turns 8
    python launch/bench.py host --max-running 256
    python launch/bench.py rank --config v3-671b --world 8 --layers 4 --batch 1 8 128
    python launch/bench.py kernels --check
    python launch/bench.py plan --config v3-671b --hardware h200x8 --batch 128 --context 4096
    python launch/bench.py balance --load FILE --ranks 8 --redundant-experts 8 --save PLACEMENT
    python launch/bench.py cache TRACE --capacity 3000 10000
    torchrun --nproc-per-node 8 launch/bench.py dispatch --config v3-671b --inner 32 --dp 8

Without --ckpt-path: the demo model.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports, which are slow

import torch

from benchlib import balance, kernels, plan, rank
from benchlib.bound import Profile
from benchlib.contest import Contender, EngineContender
from benchlib.dialogue import Dialogue, dialogue
from benchlib.dispatch import dispatch_time
from benchlib.flags import at_least
from benchlib.host import host_time
from benchlib.peer import TransformersPeer
from benchlib.replay import read_trace, replay
from benchlib.report import Report, check_report, machine
from benchlib.throughput import throughput
from benchlib.workload import Lengths, draw_jobs
from dsv3.cache.eviction import POLICIES
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.launcher import environment_rank
from dsv3.distributed.mesh import before_joining, join_world
from dsv3.engine.engine import Engine, follow
from dsv3.engine.locate import locate_checkpoint, locate_description
from dsv3.engine.program import (
    Parser,
    add_engine_flags,
    common_settings,
    engine_config,
    run_program,
    set_up_logging,
)
from dsv3.engine.start import Started, start
from dsv3.errors import ConfigError
from dsv3.setting_names import flag
from dsv3.settings import EngineConfig
from dsv3.text.tokenizer import Tokenizer

# Benchmarks that read their own flags.
ALONE = {
    "rank": (rank.main, "one rank's share of a large model, on one device"),
    "kernels": (kernels.main, "every Triton kernel, once it is right, beside its roof"),
    "plan": (plan.main, "memory and time of every layout, on paper or on this machine"),
    "balance": (balance.main, "the busiest rank's load before and after balancing experts"),
}


def lengths(text: str) -> Lengths:
    """Read a distribution of lengths."""
    try:
        return Lengths.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args() -> argparse.Namespace:
    """Read the command line; `measure` is what to do."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="benchmark", required=True)

    def add(name: str, measure: Callable[..., Report], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure)
        command.add_argument("--json", type=Path, help="write the result here")
        command.add_argument("--plot", type=Path, help="draw it, as PNG")
        return command

    batch = add("throughput", run_throughput, "an offline batch")
    forms = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    batch.add_argument("--requests", type=at_least(1), default=64)
    batch.add_argument("--prompt-len", type=lengths, default="32", help=forms)
    batch.add_argument("--answer-len", type=lengths, default="32", help=forms)
    batch.add_argument("--concurrency", type=at_least(1), default=64, help="requests at a time")
    batch.add_argument("--seed", type=int, default=0)
    talk = add("chat", run_chat, "a dialogue of many turns, with and without reuse")
    talk.add_argument("--turns", type=at_least(1), default=8)
    talk.add_argument("--user-len", type=at_least(1), default=64, help="new tokens of a turn")
    talk.add_argument("--answer-len", type=at_least(1), default=32)
    for command in (batch, talk):
        command.add_argument("--peer", choices=["transformers"], help="measured in turns with us")
        command.add_argument("--repeats", type=at_least(1), default=5)
    host = add("host", run_host, "planning and committing, without a model")
    host.add_argument("--context", type=at_least(1), default=512, help="tokens of every prompt")
    host.add_argument("--steps", type=at_least(1), default=200)
    host.add_argument("--text", action="store_true", help="make text of the answers, too")
    for command in (batch, talk, host):
        command.add_argument(
            "--threads", type=at_least(1), help="of each rank's model (default: its share)"
        )
        add_engine_flags(command)
    moe = add("dispatch", run_dispatch, "a MoE layer: how tokens come to their experts")
    moe.add_argument("--tokens", type=at_least(1), nargs="+", default=[1, 8, 64, 512])
    moe.add_argument("--config", help="of the layer's sizes (default: the demo model)")
    moe.add_argument("--inner", type=at_least(1), help="of an expert, to fit the memory")
    moe.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    moe.add_argument("--device", default="auto", help="auto, cpu or cuda")
    moe.add_argument("--tp", type=int, default=0, help="(default: all that --dp leaves)")
    moe.add_argument("--dp", type=int, default=1, help="groups of ranks with different tokens")
    moe.add_argument("--repeats", type=at_least(1), default=9)
    for name, (_, text) in ALONE.items():
        commands.add_parser(name, help=text)
    trace = add("cache", run_cache, "the hit rate of a trace of requests")
    trace.add_argument("trace", type=Path, help="JSON Lines with hash_ids")
    trace.add_argument(
        "--capacity", type=at_least(0), nargs="+", default=[1000, 3000, 10000, 30000]
    )
    trace.add_argument("--policy", nargs="+", choices=POLICIES, default=["lru", "cost"])
    args = parser.parse_args()
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of the engine that a benchmark does not use."""
    if args.benchmark == "host" and (args.profile or args.tp or args.dp > 1):
        raise ConfigError("host runs no model on no ranks; leave --profile, --tp and --dp out")
    if getattr(args, "hardware", "measure") != "measure" and not args.profile:
        raise ConfigError("--hardware gives the ceilings of --profile; add that, or leave it out")


def run_throughput(args: argparse.Namespace, started: Started) -> Report:
    """Our engine beside static batches of the peer."""
    assert started.engine is not None
    settings = replace(engine_config(args), max_running=args.concurrency)
    jobs = draw_jobs(
        args.requests,
        args.prompt_len,
        args.answer_len,
        started.config.vocab_size,
        started.engine.max_seq_len,
        args.seed,
    )
    contenders: list[Contender] = [EngineContender("dsv3", lambda: new_engine(started, settings))]
    if args.peer:
        contenders.append(TransformersPeer(args.ckpt_path, args.concurrency, started.config))
    report = throughput(contenders, jobs, args.repeats)
    what = ("requests", "prompt_len", "answer_len", "concurrency", "seed")
    report.setting = {name: str(getattr(args, name)) for name in what}
    return report


def run_chat(args: argparse.Namespace, started: Started) -> Report:
    """Our engine with reuse and without, and the peer."""
    assert started.engine is not None
    settings, shape = engine_config(args), Dialogue(args.turns, args.user_len, args.answer_len)
    if shape.num_tokens > started.engine.max_seq_len:
        raise ConfigError(
            f"a dialogue of {shape.num_tokens} tokens does not fit the context of "
            f"{started.engine.max_seq_len}; use fewer --turns"
        )
    without = replace(settings, prefix_reuse=False)
    contenders: list[Contender] = [
        EngineContender("reuse", lambda: new_engine(started, settings)),
        EngineContender("no reuse", lambda: new_engine(started, without)),
    ]
    if args.peer:
        contenders.append(TransformersPeer(args.ckpt_path, 1, started.config))
    report = dialogue(contenders, shape, started.config.vocab_size, args.repeats)
    report.setting = {name: getattr(args, name) for name in ("turns", "user_len", "answer_len")}
    return report


def run_host(args: argparse.Namespace) -> Report:
    """No model, no ranks."""
    checkpoint = locate_description(args.ckpt_path)
    tokenizer = Tokenizer.load(checkpoint) if args.text else None
    config = load_model_config(args.config or checkpoint)
    return host_time(config, engine_config(args), tokenizer, args.context, args.steps)


def run_cache(args: argparse.Namespace) -> Report:
    """Replay the trace with every policy at every capacity."""
    if not args.trace.is_file():
        raise ConfigError(f"{args.trace} is not a file")
    requests = read_trace(args.trace)
    report = Report("cache", x_label="capacity in blocks", y_label="hit rate in %")
    for policy in args.policy:
        rates = [100 * replay(requests, size, policy)["hit_rate"] for size in args.capacity]
        for capacity, rate in zip(args.capacity, rates, strict=True):
            report.rows.append({"policy": policy, "capacity": capacity, "hit rate %": rate})
        report.series[policy] = (args.capacity, rates)
    report.setting = {"trace": str(args.trace)}
    return report


def run_dispatch(args: argparse.Namespace) -> Report | None:
    """One layer on all ranks, no engine; the report is rank 0's."""
    with before_joining():
        config = load_model_config(args.config or DEMO)
    if args.inner:
        config = replace(config, moe_intermediate_size=args.inner)
    with join_world(args.device, args.tp, args.dp, name=flag) as mesh:
        mesh.layout.check(config)
        report = dispatch_time(mesh, config, getattr(torch, args.dtype), args.tokens, args.repeats)
        report.setting |= {"config": args.config or "demo", "ranks": mesh.layout.world_size}
        return report if mesh.layout.rank == 0 else None


def new_engine(started: Started, settings: EngineConfig) -> Engine:
    """Return an engine with an empty cache, on the model that is loaded."""
    assert started.engine is not None
    engine, tokenizer = started.engine, started.engine.tokenizer
    runner, cache, channel = started.runner, started.cache, started.channel
    limit, tiers = engine.max_seq_len, [None] * started.mesh.layout.dp
    return Engine(started.config, settings, runner, cache, channel, tokenizer, limit, tiers)


def main() -> int:
    """Load what is to be measured, measure, report."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in (*ALONE, "host", "cache") and environment_rank():
        return 0  # of several ranks, the first measures
    if name in ALONE:
        run, _ = ALONE[name]
        return run(sys.argv[2:])
    with before_joining():
        args = parse_args()
        set_up_logging(getattr(args, "debug", False), getattr(args, "log_dir", None))
        check_report(args, inputs=("trace",))
    if args.benchmark in ("throughput", "chat"):
        report = measure_model(args)
    else:
        report = args.measure(args)
        if report is not None:
            report.setting |= machine(report.setting.get("ranks", 1))
    if report is not None:
        report.publish(args.json, args.plot)
    return 0


def measure_model(args: argparse.Namespace) -> Report | None:
    """Measure on all ranks of the world; the report is rank 0's."""
    place = args.device, args.tp, args.dp, args.rank_timeout
    with join_world(*place, common_settings(args), flag) as mesh:
        if args.threads:
            torch.set_num_threads(args.threads)
        config = load_model_config(args.config) if args.config else None
        args.ckpt_path = locate_checkpoint(args.ckpt_path, mesh)
        started = start(args.ckpt_path, engine_config(args), mesh, config, args.n_experts)
        profile = Profile(args.hardware, started) if args.profile else None
        if started.engine is None:
            follow(started.runner, started.channel)
            started.runner.finish()
            return None
        try:
            report: Report = args.measure(args, started)
        finally:
            started.engine.stop()
        started.runner.finish()
        if profile is not None:
            report.notes.append(f"\n{profile.report()}")
        report.setting |= machine(mesh.layout.world_size)
        return report


if __name__ == "__main__":
    run_program(main)
