"""Benchmarks of a loaded model: random requests, conversations with drafts, dialogues."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchlib.bound import Profile
from benchlib.contest import Contender, EngineContender
from benchlib.dialogue import Dialogue, dialogue
from benchlib.drafts import compare_drafts, read_conversations
from benchlib.flags import add_request_flags, at_least
from benchlib.peer import TransformersPeer
from benchlib.report import Report
from benchlib.throughput import throughput
from benchlib.workload import draw_requests
from common import start_model
from dsv3.distributed.mesh import before_joining
from dsv3.engine.engine import Engine, follow
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.speculation import NO_DRAFTS, Speculation
from dsv3.engine.start import Started
from dsv3.errors import ConfigError
from dsv3.settings import EngineConfig
from program import (
    add_profile_flags,
    check_profile_flags,
    engine_config,
    join_engine_ranks,
)


def add_throughput_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an offline batch."""
    add_request_flags(parser)
    text = "most running requests"
    parser.add_argument("--concurrency", type=at_least(1), default=64, help=text)
    _add_peer_flags(parser)


def add_drafts_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of conversations with drafts."""
    add = parser.add_argument
    text = "rows with messages, as for generate.py"
    add("--input-file", type=Path, required=True, help=text)
    add("--answer-len", type=at_least(2), default=96, help="most tokens of answers")
    text = "running requests"
    add("--concurrency", type=at_least(1), nargs="+", default=[1, 8, 32], help=text)
    add("--repeats", type=at_least(1), default=3, help="timed runs of each")
    _add_common_flags(parser)


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of dialogues."""
    add = parser.add_argument
    add("--turns", type=at_least(1), default=8, help="turns of a dialogue")
    add("--user-len", type=at_least(1), default=64, help="user tokens of each turn")
    add("--answer-len", type=at_least(1), default=32, help="tokens of each answer")
    _add_peer_flags(parser)


def _add_peer_flags(parser: argparse.ArgumentParser) -> None:
    text = "also measure this library, alternating"
    parser.add_argument("--peer", choices=["transformers"], help=text)
    parser.add_argument("--repeats", type=at_least(1), default=5, help="timed runs of each")
    _add_common_flags(parser)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    text = "CPU threads of each rank (default: its share)"
    parser.add_argument("--threads", type=at_least(1), help=text)
    add_profile_flags(parser)


def measure(
    run: Callable[[argparse.Namespace, Started], Report], args: argparse.Namespace
) -> Report | None:
    """Load the model on all ranks and measure it with `run`; rank 0 returns the report."""
    with before_joining():
        check_profile_flags(args)
    with join_engine_ranks(args) as mesh:
        args.ckpt_path = locate_checkpoint(args.ckpt_path, mesh)
        started = start_model(args, mesh)
        profile = Profile(args.hardware, started) if args.profile else None
        if started.engine is None:
            follow(started.runner, started.channel)
            started.runner.finish()
            return None
        try:
            report = run(args, started)
        finally:
            started.engine.stop()
        started.runner.finish()
        if profile is not None:
            report.notes.append(f"\n{profile.report()}")
        report.setting["ranks"] = mesh.layout.world_size
        return report


def run_throughput(args: argparse.Namespace, started: Started) -> Report:
    """Compare the engine with the peer's static batches on random requests."""
    assert started.engine is not None
    settings = replace(engine_config(args), max_running=args.concurrency)
    least = args.prompt_len.least + args.answer_len.least
    if least > started.engine.max_seq_len:
        raise ConfigError(
            f"--prompt-len={args.prompt_len} and --answer-len={args.answer_len} need {least} "
            f"tokens, the context has {started.engine.max_seq_len}"
        )
    requests = draw_requests(
        args.requests,
        args.prompt_len,
        args.answer_len,
        started.config.vocab_size,
        started.engine.max_seq_len,
        args.seed,
    )
    contenders: list[Contender] = [EngineContender("dsv3", partial(_new_engine, started, settings))]
    if args.peer:
        contenders.append(TransformersPeer(args.ckpt_path, args.concurrency, started.config))
    report = throughput(contenders, requests, args.repeats)
    flags = ("requests", "prompt_len", "answer_len", "concurrency", "seed")
    report.setting = {name: str(getattr(args, name)) for name in flags}
    return report


def run_drafts(args: argparse.Namespace, started: Started) -> Report:
    """Compare numbers of drafts on conversations that end where the model ends them."""
    most = started.speculation.num_drafts
    if not most:
        raise ConfigError("give --speculative-tokens, the most drafts to compare")
    settings = engine_config(args)

    def contender(count: int, is_adaptive: bool, concurrency: int) -> EngineContender:
        own = replace(settings, max_running=concurrency, speculative_adaptive=is_adaptive)
        speculation = replace(started.speculation, num_drafts=count) if count else NO_DRAFTS
        name = f"up to {count} drafts" if is_adaptive else f"{count} drafts"
        make = partial(_new_engine, started, own, speculation)
        return EngineContender(name, make, ignore_eos=False)

    requests = read_conversations(args.input_file, args.ckpt_path, started, args.answer_len)
    report = Report("drafts", x_label="drafts", y_label="answer tokens a second")
    for concurrency in args.concurrency:
        contenders = [contender(count, False, concurrency) for count in range(most + 1)]
        contenders.append(contender(most, True, concurrency))
        compare_drafts(report, contenders, requests, concurrency, args.repeats)
    report.setting = {"input_file": args.input_file.name, "requests": len(requests)}
    return report


def run_chat(args: argparse.Namespace, started: Started) -> Report:
    """Compare the engine with prefix reuse, without it, and the peer on dialogues."""
    assert started.engine is not None
    settings = engine_config(args)
    shape = Dialogue(args.turns, args.user_len, args.answer_len)
    if shape.num_tokens > started.engine.max_seq_len:
        raise ConfigError(
            f"a dialogue of {shape.num_tokens} tokens does not fit the context of "
            f"{started.engine.max_seq_len}; use fewer --turns"
        )
    no_reuse = replace(settings, prefix_reuse=False)
    contenders: list[Contender] = [
        EngineContender("reuse", partial(_new_engine, started, settings)),
        EngineContender("no reuse", partial(_new_engine, started, no_reuse)),
    ]
    if args.peer:
        contenders.append(TransformersPeer(args.ckpt_path, 1, started.config))
    report = dialogue(contenders, shape, started.config.vocab_size, args.repeats)
    report.setting = {name: getattr(args, name) for name in ("turns", "user_len", "answer_len")}
    return report


def _new_engine(
    started: Started, settings: EngineConfig, speculation: Speculation | None = None
) -> Engine:
    """Return an engine with an empty cache and without tiers, on the loaded model."""
    assert started.engine is not None
    return Engine(
        started.config,
        settings,
        started.runner,
        started.cache,
        started.channel,
        started.engine.tokenizer,
        started.engine.max_seq_len,
        [None] * started.mesh.layout.dp,
        started.speculation if speculation is None else speculation,
    )
