"""The benchmark of a running server: closed loop, open loop at random times, or a trace."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchlib.flags import at_least
from benchlib.report import Report, check_report, machine
from benchlib.serving import Target, closed_loop, open_loop, poisson, read_load, serving_report
from benchlib.workload import Lengths, draw_requests
from dsv3.errors import ConfigError
from program import Parser, set_up_logging

_CONCURRENCY = 16


def main(argv: Sequence[str]) -> int:
    """Measure the server that the flags name, and print the report."""
    args = parse_args(argv)
    set_up_logging(args.debug)
    check_report(args, inputs=("trace",))
    report = measure(args)
    report.setting |= machine(1)
    report.publish(args.json, args.plot)
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    parser = Parser(prog="bench.py serve", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="address of the server")
    add("--api-key", default="", help="key of the server")
    load = parser.add_mutually_exclusive_group()
    text = f"closed loop: number of requests that are open all the time (default: {_CONCURRENCY})"
    load.add_argument("--concurrency", type=at_least(1), help=text)
    text = "open loop: requests at random times (Poisson); their average number a second"
    load.add_argument("--rate", type=float, help=text)
    text = "open loop: JSON Lines with timestamp (ms), input_length, output_length and hash_ids"
    load.add_argument("--trace", type=Path, help=text)
    add("--speed", type=float, default=1.0, help="of the clock of --trace")
    add("--requests", type=at_least(1), default=64, help="number of requests")
    formats = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    add("--prompt-len", type=_lengths, default="32", help=f"tokens of prompts: {formats}")
    add("--answer-len", type=_lengths, default="32", help=f"tokens of answers: {formats}")
    add("--seed", type=int, default=0, help="of the random requests (default: 0)")
    add("--json", type=Path, help="file to write the result to")
    add("--plot", type=Path, help="file to write a plot to (PNG, SVG, PDF)")
    add("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(argv)
    for name in ("rate", "speed"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name}={value} must be above 0")
    return args


def measure(args: argparse.Namespace) -> Report:
    """Send the load of the flags to the server."""
    target = Target(args.url, args.api_key)
    limit = target.model["max_model_len"]
    vocab_size = target.model["vocab_size"]
    setting: dict[str, Any] = {"model": target.model["id"], "seed": args.seed}
    if args.trace is not None:
        load = read_load(args.trace, args.speed, limit, vocab_size)[: args.requests]
        setting |= {"trace": str(args.trace), "speed": args.speed, "requests": len(load)}
        timings, seconds = open_loop(target, load)
    else:
        requests = draw_requests(
            args.requests, args.prompt_len, args.answer_len, vocab_size, limit, args.seed
        )
        names = ("requests", "prompt_len", "answer_len")
        setting |= {name: str(getattr(args, name)) for name in names}
        if args.rate is not None:
            setting["rate"] = args.rate
            timings, seconds = open_loop(target, poisson(requests, args.rate, args.seed))
        else:
            setting["concurrency"] = args.concurrency or _CONCURRENCY
            timings, seconds = closed_loop(target, requests, args.concurrency or _CONCURRENCY)
    report = serving_report(timings, seconds)
    report.setting = setting | report.setting
    return report


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
