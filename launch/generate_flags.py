"""The flags of generate.py, the checks of each against the others, and the defaults they set."""

import argparse
import sys
from pathlib import Path

from dsv3.checkpoint.source import declared_config
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.serve.exporter import check_exporter
from dsv3.text.chat import AnyFormat, ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from program import Parser, add_engine_flags, add_profile_flags, check_profile_flags
from program_files import check_files


def parse_args() -> argparse.Namespace:
    """Parse the command line; flags of DeepSeek's generate.py keep their names and meaning."""
    parser = Parser(description="Answer prompts with a DeepSeek-V3-family model split over ranks.")
    add_task_flags(parser.add_argument_group("input and output"))
    add_sampling_flags(
        parser.add_argument_group(
            "sampling, for rows without own values (a checkpoint may have other defaults)"
        )
    )
    add_engine_flags(parser)
    add_profile_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    inputs = ("--input-file", "--prewarm")
    outputs = ("--output-file", "--stats-file")
    check_files(args, inputs, outputs, prints=not args.output_file)
    for name in ("stats_file", "record_expert_load"):
        if getattr(args, name) == "-":
            setattr(args, name, "/dev/stdout")
    return args


def add_task_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of prompts, answers and statistics."""
    add = group.add_argument
    add("--interactive", action="store_true", help="chat on the terminal")
    add(
        "--on-full",
        choices=("drop", "stop"),
        help="when a chat's context is full: drop the oldest turns (default), or stop",
    )
    add(
        "--no-history",
        action="store_true",
        help="do not keep the messages of chats for the arrow keys of later chats",
    )
    add(
        "--prompt",
        action="append",
        help="answer this on standard output; without other input, read from a pipe",
    )
    add("--input-file", help="prompts, one per line, or OpenAI Batch JSONL (-: standard input)")
    add("--prompt-separator", help="line (default) or blank-line")
    add("--prewarm", help="file of prompts to compute first and keep in the cache")
    add("--output-file", help="OpenAI Batch results; a second start resumes (-: standard output)")
    add("--overwrite", action="store_true", help="delete the results in --output-file first")
    add("--strict", action="store_true", help="exit with 1 if any row failed, not only if all")
    add("--stats-file", help="file to write the run's statistics to, as JSON")
    add("--metrics-port", type=int, help="serve /metrics for Prometheus on this port")
    add(
        "--metrics-host",
        default="127.0.0.1",
        help="address to serve /metrics on; 0.0.0.0 is all interfaces",
    )


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags with defaults of sampling parameters."""
    add = group.add_argument
    add(
        "--max-new-tokens", type=int, help="most tokens of an answer (default: 200; chat: no limit)"
    )
    add("--temperature", type=float, help="0 is greedy (default: 0.2)")
    add(
        "--top-p",
        type=float,
        help="keep the likeliest tokens up to this sum of probabilities (default: 1)",
    )
    add("--top-k", type=int, help="keep only this many of the likeliest tokens (default: all)")
    add(
        "--min-p",
        type=float,
        help="drop tokens less likely than this share of the likeliest one (default: 0)",
    )
    add(
        "--repetition-penalty",
        type=float,
        help="divide the logits of tokens in the prompt or the answer by this (default: 1)",
    )
    add(
        "--frequency-penalty",
        type=float,
        help="subtract this from a token's logit for each occurrence in the answer (default: 0)",
    )
    add(
        "--presence-penalty",
        type=float,
        help="subtract this once from the logits of tokens in the answer (default: 0)",
    )
    add("--seed", type=int, help="seed of the random numbers (default: 0)")
    add("--thinking", action="store_true", help="let the model think before it answers")
    add("--system", help="system message of conversations without one")
    add("--chat-template", metavar="FILE", help="Jinja template to use instead of the checkpoint's")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that exclude each other or need an input."""
    given = [
        name
        for name, value in (
            ("--interactive", args.interactive),
            ("--input-file", args.input_file is not None),
            ("--prompt", args.prompt is not None),
        )
        if value
    ]
    if len(given) > 1:
        raise ConfigError(f"give {given[0]} or {given[1]}, not both")
    if args.prompt is not None and len(args.prompt) > 1:
        raise ConfigError("give --prompt once; an --input-file holds several, one per line")
    if given != ["--input-file"] and (args.output_file or args.strict):
        flag = "--output-file" if args.output_file else "--strict"
        raise ConfigError(f"{flag} requires --input-file (-: standard input)")
    check_required_flags(args)


def check_required_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that need another flag."""
    if args.input_file and not args.output_file and sys.__stdout__ is None:
        raise ConfigError("standard output is closed; give --output-file for the answers")
    if args.metrics_port is not None:
        check_exporter(args.metrics_port)
    if args.overwrite and not args.output_file:
        raise ConfigError("--overwrite requires --output-file")
    for name, value in (("--on-full", args.on_full), ("--no-history", args.no_history)):
        if value and not args.interactive:
            raise ConfigError(f"{name} is for a chat; add --interactive, or leave it out")
    if args.prompt_separator and not (args.input_file or args.prewarm):
        raise ConfigError("--prompt-separator requires --input-file or --prewarm")
    check_profile_flags(args)


def request_defaults(args: argparse.Namespace, checkpoint: Path) -> Defaults:
    """Return the defaults of requests, from the sampling flags and the checkpoint."""
    flags = Sampling(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
    )
    return Defaults(
        flags=flags,
        model=Sampling.of_checkpoint(checkpoint),
        seed=args.seed or 0,
        thinking=args.thinking,
        system=args.system,
    )


def chat_format_of(
    args: argparse.Namespace, checkpoint: Path, config: ModelConfig | None
) -> AnyFormat:
    """Return the checkpoint's format of conversations, or that of --chat-template."""
    template = Path(args.chat_template) if args.chat_template else None
    model_type = declared_config(checkpoint, config).model_type
    return ChatFormat.of_directory(checkpoint, model_type, template)
