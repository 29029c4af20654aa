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
    torchrun --nproc-per-node 2 launch/bench.py plan --measure
    python launch/bench.py balance --load FILE --ranks 8 --redundant-experts 8 --save PLACEMENT
    python launch/bench.py cache TRACE --capacity 3000 10000
    torchrun --nproc-per-node 8 launch/bench.py dispatch --config v3-671b --inner 32 --dp 8
    torchrun --nproc-per-node 2 launch/bench.py exchange
    python launch/bench.py serve --url http://127.0.0.1:8000 --concurrency 64

Without --ckpt-path: the demo model.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

from benchlib import (
    balance,
    context,
    dispatch,
    exchange,
    host,
    kernels,
    loaded_model,
    plan,
    rank,
    replay,
    serve,
)
from benchlib.report import Report, check_report, machine
from dsv3.distributed.launcher import environment_world_size
from dsv3.distributed.mesh import before_joining
from dsv3.errors import ConfigError
from program import Parser, add_engine_flags, run_program, set_up_logging


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        about: the quantities that it measures.
        add_flags: adds its own flags.
        run: measures; returns None on ranks without a report.
        has_engine: it has the engine's flags, too.
        has_ranks: it may run on several ranks.
        has_curves: its report can be drawn.
        inputs, outputs: its flags that name files to read, or to write beside the report.
    """

    about: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Report | None]
    has_engine: bool = False
    has_ranks: bool = False
    has_curves: bool = True
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()


_of_model = partial(Benchmark, has_engine=True, has_ranks=True)
BENCHMARKS = {
    "throughput": _of_model(
        about="an offline batch of random requests",
        add_flags=loaded_model.add_throughput_flags,
        run=partial(loaded_model.measure, loaded_model.run_throughput),
    ),
    "drafts": _of_model(
        about="conversations, with drafts of the next tokens and without",
        add_flags=loaded_model.add_drafts_flags,
        run=partial(loaded_model.measure, loaded_model.run_drafts),
        inputs=("--input-file",),
    ),
    "chat": _of_model(
        about="dialogues of many turns, with and without prefix reuse",
        add_flags=loaded_model.add_chat_flags,
        run=partial(loaded_model.measure, loaded_model.run_chat),
    ),
    "host": Benchmark(
        about="planning and committing, without a model",
        add_flags=host.add_flags,
        run=host.run,
        has_engine=True,
        has_curves=False,
    ),
    "dispatch": Benchmark(
        about="a MoE layer: variants of the token dispatch",
        add_flags=dispatch.add_flags,
        run=dispatch.run,
        has_ranks=True,
    ),
    "exchange": Benchmark(
        about="latency and bandwidth of the exchanges between ranks",
        add_flags=exchange.add_flags,
        run=exchange.run,
        has_ranks=True,
    ),
    "cache": Benchmark(
        about="hit rate of the prefix cache on a trace of requests",
        add_flags=replay.add_flags,
        run=replay.run,
        inputs=("trace",),
    ),
    "rank": Benchmark(
        about="one rank's share of a large model, on one device",
        add_flags=rank.add_flags,
        run=rank.run,
        has_curves=False,
        outputs=("--rows",),
    ),
    "context": Benchmark(
        about="an attention layer at long contexts, dense beside sparse",
        add_flags=context.add_flags,
        run=context.run,
    ),
    "kernels": Benchmark(
        about="check every Triton kernel, then time it against its roofline",
        add_flags=kernels.add_flags,
        run=kernels.run,
        has_curves=False,
        outputs=("--rows",),
    ),
    "plan": Benchmark(
        about="memory and step time of every layout, computed or measured here",
        add_flags=plan.add_flags,
        run=plan.run,
        has_engine=True,
        has_ranks=True,
        has_curves=False,
        inputs=("--hardware",),
        outputs=("--save-hardware",),
    ),
    "serve": Benchmark(
        about="load on a running server: latencies and throughput",
        add_flags=serve.add_flags,
        run=serve.run,
        inputs=("--trace",),
    ),
    "balance": Benchmark(
        about="load of the busiest rank before and after balancing experts",
        add_flags=balance.add_flags,
        run=balance.run,
        inputs=("--load",),
        outputs=("--save",),
    ),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None is that of the program."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about, description=benchmark.about)
        benchmark.add_flags(command)
        command.add_argument("--json", type=Path, help="file to write the result to")
        if benchmark.has_curves:
            text = "file to write a plot to (PNG, SVG, PDF)"
            command.add_argument("--plot", type=Path, help=text)
        if benchmark.has_engine:
            add_engine_flags(command)
        else:
            command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the command line names, and print its report."""
    with before_joining():
        args = parse_args(arguments)
        benchmark = BENCHMARKS[args.benchmark]
        if environment_world_size() > 1 and not benchmark.has_ranks:
            raise ConfigError(
                f"{args.benchmark} runs on one rank; start it with python, not with torchrun"
            )
        set_up_logging(args.debug, getattr(args, "log_dir", None))
        check_report(args, benchmark.inputs, benchmark.outputs)
    report = benchmark.run(args)
    if report is not None:
        if not report.is_computed:
            report.setting |= machine(report.setting.get("ranks", 1))
        report.publish(args.json, getattr(args, "plot", None))
        report.raise_failures()
    return 0


if __name__ == "__main__":
    run_program(main)
