"""The benchmark of a running server: closed loop, open loop at random times, or a trace."""

import argparse
from pathlib import Path
from typing import Any

from benchlib.flags import add_request_flags, at_least
from benchlib.report import Report
from benchlib.serving import Target, closed_loop, open_loop, poisson, read_load, serving_report
from benchlib.workload import draw_requests
from dsv3.errors import ConfigError

_CONCURRENCY = 16


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
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
    add_request_flags(parser)


def run(args: argparse.Namespace) -> Report:
    """Send the load of the flags to the server."""
    for name in ("rate", "speed"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name}={value} must be above 0")
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
