"""Benchmarks: throughput, dialogues, host time, long contexts, kernels, layouts, exchanges.

    torchrun --nproc-per-node 2 launch/bench.py throughput --requests 64
    python launch/bench.py throughput --requests 64 --threads 1 --peer transformers
    python launch/bench.py chat --turns 8
    python launch/bench.py drafts --input-file ROWS.jsonl --speculative-tokens 3
    python launch/bench.py host --max-running 256
    TRITON_INTERPRET=0 python launch/bench.py host --launches --config v3-671b
    python launch/bench.py rank --config v3-671b --world 8 --layers 4 --batch 1 8 128
    python launch/bench.py context --config v3.2-671b --lengths 4096 16384 65536
    python launch/bench.py kernels --check
    python launch/bench.py plan --config v3-671b --hardware h200x8 --batch 128 --context 4096
    python launch/bench.py balance --load FILE --ranks 8 --redundant-experts 8 --save PLACEMENT
    python launch/bench.py cache TRACE --capacity 3000 10000
    torchrun --nproc-per-node 8 launch/bench.py dispatch --config v3-671b --inner 32 --dp 8
    torchrun --nproc-per-node 2 launch/bench.py exchange
    python launch/bench.py serve --url http://127.0.0.1:8000 --concurrency 64

Without --ckpt-path: the demo model.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

import torch

from benchlib import balance, context, kernels, plan, rank, serve
from benchlib.bound import Profile
from benchlib.dispatch import dispatch_time
from benchlib.exchange import exchange_time
from benchlib.flags import at_least
from benchlib.host import host_time
from benchlib.launches import launch_time
from benchlib.loaded_model import run_chat, run_drafts, run_throughput
from benchlib.replay import read_trace, replay
from benchlib.report import Report, check_report, machine
from benchlib.workload import Lengths
from common import tune_for_model, tune_process
from dsv3.cache.eviction import POLICIES
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.launcher import environment_rank
from dsv3.distributed.mesh import before_joining
from dsv3.engine.engine import follow
from dsv3.engine.locate import locate_checkpoint, locate_description
from dsv3.engine.start import start
from dsv3.errors import ConfigError
from dsv3.text.tokenizer import Tokenizer
from program import (
    Parser,
    add_engine_flags,
    common_settings,
    engine_config,
    join_ranks,
    run_program,
    set_up_logging,
)

# Benchmarks that parse their own flags: entry point and help text.
STANDALONE = {
    "rank": (rank.main, "one rank's share of a large model, on one device"),
    "context": (context.main, "an attention layer at long contexts, dense beside sparse"),
    "kernels": (kernels.main, "check every Triton kernel, then time it against its roofline"),
    "plan": (plan.main, "memory and step time of every layout, computed or measured here"),
    "serve": (serve.main, "load on a running server: latencies and throughput"),
    "balance": (balance.main, "load of the busiest rank before and after balancing experts"),
}


AddBenchmark = Callable[[str, Callable[..., Report | None], str], argparse.ArgumentParser]


def lengths(text: str) -> Lengths:
    """Parse a distribution of lengths."""
    try:
        return Lengths.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args() -> argparse.Namespace:
    """Parse the command line; the attribute `measure` is the benchmark's function."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="benchmark", required=True)

    def add(name: str, measure: Callable[..., Report | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure)
        command.add_argument("--json", type=Path, help="file to write the result to")
        command.add_argument("--plot", type=Path, help="file to write a plot to (PNG, SVG, PDF)")
        return command

    add_model_benchmarks(add)
    add_dispatch_benchmark(add)
    add_exchange_benchmark(add)
    add_cache_benchmark(add)
    for name, (_, text) in STANDALONE.items():
        commands.add_parser(name, help=text)
    args = parser.parse_args()
    check_flags(args)
    return args


def add_model_benchmarks(add: AddBenchmark) -> None:
    """Add the benchmarks with the engine's flags: throughput, chat and host."""
    batch = add("throughput", run_throughput, "an offline batch of random requests")
    formats = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    batch.add_argument("--requests", type=at_least(1), default=64, help="number of requests")
    batch.add_argument(
        "--prompt-len", type=lengths, default="32", help=f"tokens of prompts: {formats}"
    )
    batch.add_argument(
        "--answer-len", type=lengths, default="32", help=f"tokens of answers: {formats}"
    )
    batch.add_argument("--concurrency", type=at_least(1), default=64, help="most running requests")
    batch.add_argument("--seed", type=int, default=0, help="of the random requests (default: 0)")
    drafts = add("drafts", run_drafts, "conversations, with drafts of the next tokens and without")
    text = "rows with messages, as for generate.py"
    drafts.add_argument("--input-file", type=Path, required=True, help=text)
    drafts.add_argument("--answer-len", type=at_least(2), default=96, help="most tokens of answers")
    drafts.add_argument(
        "--concurrency", type=at_least(1), nargs="+", default=[1, 8, 32], help="running requests"
    )
    drafts.add_argument("--repeats", type=at_least(1), default=3, help="timed runs of each")
    talk = add("chat", run_chat, "dialogues of many turns, with and without prefix reuse")
    talk.add_argument("--turns", type=at_least(1), default=8, help="turns of a dialogue")
    talk.add_argument("--user-len", type=at_least(1), default=64, help="user tokens of each turn")
    talk.add_argument("--answer-len", type=at_least(1), default=32, help="tokens of each answer")
    for command in (batch, talk):
        command.add_argument(
            "--peer", choices=["transformers"], help="also measure this library, alternating"
        )
        command.add_argument("--repeats", type=at_least(1), default=5, help="timed runs of each")
    host = add("host", run_host, "planning and committing, without a model")
    host.add_argument("--context", type=at_least(1), default=512, help="tokens of each prompt")
    host.add_argument("--steps", type=at_least(1), default=200, help="timed steps")
    host.add_argument("--text", action="store_true", help="also detokenize the answers")
    text = "time the Python code around an eager step's launches instead"
    host.add_argument("--launches", action="store_true", help=text)
    for command in (batch, drafts, talk, host):
        command.add_argument(
            "--threads", type=at_least(1), help="CPU threads of each rank (default: its share)"
        )
        add_engine_flags(command)


def add_dispatch_benchmark(add: AddBenchmark) -> None:
    """Add the benchmark of a MoE layer's dispatch."""
    moe = add("dispatch", run_dispatch, "a MoE layer: variants of the token dispatch")
    moe.add_argument(
        "--tokens",
        type=at_least(1),
        nargs="+",
        default=[1, 8, 64, 512],
        help="tokens of each dp group",
    )
    moe.add_argument("--config", help="model whose layer to build (default: the demo model)")
    moe.add_argument("--inner", type=at_least(1), help="width of an expert, to fit the memory")
    moe.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="of weights and activations",
    )
    moe.add_argument("--device", default="auto", help="auto, cpu or cuda")
    moe.add_argument(
        "--tp", type=int, default=0, help="tensor-parallel ranks (default: ranks / dp)"
    )
    moe.add_argument("--dp", type=int, default=1, help="data-parallel groups")
    moe.add_argument("--repeats", type=at_least(1), default=9, help="timed runs of each variant")


def add_exchange_benchmark(add: AddBenchmark) -> None:
    """Add the benchmark of the exchanges between ranks."""
    command = add("exchange", run_exchange, "latency and bandwidth of the exchanges between ranks")
    command.add_argument(
        "--bytes",
        type=at_least(1),
        nargs="+",
        default=[1 << 10, 16 << 10, 256 << 10, 4 << 20],
        help="sizes of the whole tensor",
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--repeats", type=at_least(1), default=9, help="timed runs of each")


def add_cache_benchmark(add: AddBenchmark) -> None:
    """Add the benchmark of the prefix cache's hit rate."""
    trace = add("cache", run_cache, "hit rate of the prefix cache on a trace of requests")
    trace.add_argument("trace", type=Path, help="JSON Lines with hash_ids")
    trace.add_argument(
        "--capacity",
        type=at_least(0),
        nargs="+",
        default=[1000, 3000, 10000, 30000],
        help="blocks that the cache holds",
    )
    trace.add_argument(
        "--policy",
        nargs="+",
        choices=POLICIES,
        default=["lru", "cost"],
        help="eviction policies",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for engine flags that a benchmark does not use."""
    if args.benchmark == "host" and (args.profile or args.tp or args.dp > 1):
        raise ConfigError("host runs no model on no ranks; leave --profile, --tp and --dp out")
    if getattr(args, "hardware", "measure") != "measure" and not args.profile:
        raise ConfigError("--hardware gives the ceilings of --profile; add that, or leave it out")


def run_host(args: argparse.Namespace) -> Report:
    """Time the host's share of steps; no model is loaded and no ranks are joined."""
    checkpoint = locate_description(args.ckpt_path)
    tokenizer = Tokenizer.load(checkpoint) if args.text else None
    config = load_model_config(args.config or checkpoint)
    if args.launches:
        return launch_time(config, args.context, args.steps)
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
    """Time one MoE layer on all ranks; rank 0 returns the report."""
    with before_joining():
        config = load_model_config(args.config or DEMO)
    if args.inner:
        config = replace(config, moe_intermediate_size=args.inner)
    with join_ranks(args.device, args.tp, args.dp) as mesh:
        tune_process(mesh)
        mesh.layout.check(config)
        report = dispatch_time(mesh, config, getattr(torch, args.dtype), args.tokens, args.repeats)
        report.setting |= {"config": args.config or "demo", "ranks": mesh.layout.world_size}
        return report if mesh.layout.rank == 0 else None


def run_exchange(args: argparse.Namespace) -> Report | None:
    """Time the exchanges of all ranks; rank 0 returns the report."""
    with join_ranks(args.device) as mesh:
        if mesh.world.size == 1:
            raise ConfigError("exchange needs several ranks: torchrun --nproc-per-node 2 ...")
        tune_process(mesh)
        report = exchange_time(mesh, args.bytes, args.repeats)
        report.setting = {"ranks": mesh.layout.world_size}
        return report if mesh.layout.rank == 0 else None


def main() -> int:
    """Run the benchmark that the command line names, and print its report."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in (*STANDALONE, "host", "cache") and environment_rank():
        return 0  # of several ranks, the first measures
    if name in STANDALONE:
        run, _ = STANDALONE[name]
        return run(sys.argv[2:])
    with before_joining():
        args = parse_args()
        set_up_logging(getattr(args, "debug", False), getattr(args, "log_dir", None))
        check_report(args, inputs=("trace", "input_file"))
    if args.benchmark in ("throughput", "drafts", "chat"):
        report = measure_model(args)
    else:
        report = args.measure(args)
        if report is not None:
            report.setting |= machine(report.setting.get("ranks", 1))
    if report is not None:
        report.publish(args.json, args.plot)
    return 0


def measure_model(args: argparse.Namespace) -> Report | None:
    """Load the model on all ranks and measure it; rank 0 returns the report."""
    with join_ranks(
        args.device,
        args.tp,
        args.dp,
        args.rank_timeout,
        common_settings(args),
        one_shot=args.one_shot,
        cpu_exchange=args.cpu_exchange,
    ) as mesh:
        tune_process(mesh, args.threads)
        config = load_model_config(args.config) if args.config else None
        args.ckpt_path = locate_checkpoint(args.ckpt_path, mesh)
        started = start(args.ckpt_path, engine_config(args), mesh, config, args.n_experts)
        tune_for_model(started.config, mesh, args.threads)
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
