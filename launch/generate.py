"""Answer prompts with a DeepSeek-V3-family model split over ranks.

    torchrun --nproc-per-node 8 launch/generate.py --ckpt-path DIR --input-file FILE

The file holds one prompt a line, or OpenAI Batch rows (JSONL). Without torchrun: one rank.
"""

import argparse
import json
import logging
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from dsv3.config_files import load_model_config
from dsv3.engine.engine import Engine, follow
from dsv3.engine.program import (
    Parser,
    add_engine_flags,
    engine_config,
    run_program,
    set_up_logging,
)
from dsv3.engine.start import Started, start
from dsv3.engine.stats import collect_stats
from dsv3.errors import ConfigError
from dsv3.parallel.mesh import Mesh, join_world
from dsv3.parallel.together import fail_together
from dsv3.serve.batch import BatchSummary, run_batch
from dsv3.serve.progress import Progress
from dsv3.serve.sinks import JournalSink, TextSink
from dsv3.text.batch_file import BatchInput
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from dsv3.text.journal import Journal

log = logging.getLogger("dsv3")
DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "demo-v3"


def parse_args() -> argparse.Namespace:
    """Read the command line: DeepSeek's flags with their meaning, and ours."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_argument_group("what to answer")
    what.add_argument("--interactive", action="store_true", help="chat on the terminal")
    what.add_argument("--input-file", help="prompts, one a line, or OpenAI Batch JSONL")
    what.add_argument("--prompt-separator", default="line", help="line or blank-line")
    what.add_argument("--output-file", help="OpenAI Batch results; a second start resumes")
    what.add_argument("--overwrite", action="store_true", help="start --output-file anew")
    what.add_argument("--strict", action="store_true", help="exit with 1 if any row failed")
    what.add_argument("--stats-file", help="write what the run used and did, as JSON")
    sampling = parser.add_argument_group("sampling, where a row does not say")
    sampling.add_argument("--max-new-tokens", type=int, help="tokens of an answer (200)")
    sampling.add_argument("--temperature", type=float, help="0 is greedy (0.2)")
    sampling.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this sum")
    sampling.add_argument("--top-k", type=int, help="keep this many likeliest tokens")
    sampling.add_argument("--seed", type=int, default=0, help="names the random numbers (0)")
    sampling.add_argument("--thinking", action="store_true", help="let the model think first")
    sampling.add_argument("--system", help="system message of chats that have none")
    add_engine_flags(parser)
    args = parser.parse_args()
    if args.interactive:
        raise ConfigError("--interactive is not there yet; use --input-file")
    if not args.input_file:
        raise ConfigError("nothing to answer: give --input-file FILE")
    return args


def read_input(args: argparse.Namespace, checkpoint: Path) -> BatchInput:
    """Open the input with the defaults that hold where a row is silent."""
    generation = checkpoint / "generation_config.json"
    told = json.loads(generation.read_text()) if generation.is_file() else {}
    flags = Sampling(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
    )
    defaults = Defaults(
        flags=flags,
        model=Sampling.from_generation_config(told),
        seed=args.seed,
        thinking=args.thinking,
        system=args.system,
    )
    return BatchInput(Path(args.input_file), defaults, args.prompt_separator)


def answer(
    started: Started, engine: Engine, rows: BatchInput, journal: Journal | None, name: str
) -> BatchSummary:
    """Answer all rows into the journal, or as text on standard output."""
    chat = ChatFormat.load_optional(engine.tokenizer, started.config.model_type, name)
    if journal is None:
        return run_batch(engine, rows, TextSink(sys.stdout), chat, Progress(rows.count(), 0))
    sink = JournalSink(journal, engine.tokenizer)
    return run_batch(engine, rows, sink, chat, Progress(rows.count(), journal.num_done))


def run(args: argparse.Namespace, mesh: Mesh, files: ExitStack, begin: float) -> int:
    """Load, answer, report; every rank runs this."""
    checkpoint = Path(args.ckpt_path) if args.ckpt_path else DEMO
    seconds = {"rendezvous": time.perf_counter() - begin}
    is_first = mesh.layout.rank == 0
    if is_first and not args.ckpt_path:
        log.info("no --ckpt-path: using the demo model in %s", DEMO)
    journal = None
    with fail_together(mesh, "reading the input"):
        config = load_model_config(args.config) if args.config else None
        settings = engine_config(args)
        if is_first:
            rows = read_input(args, checkpoint)
            if args.output_file:
                journal = files.enter_context(Journal(Path(args.output_file), args.overwrite))
                journal.resume(rows)
    started = start(checkpoint, settings, mesh, config, args.n_experts)
    seconds.update(started.seconds)
    if started.engine is None:
        follow(started.runner, started.channel)
        collect_stats(started, seconds)
        return 0
    log.info("start-up: %s", ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
    summary = answer(started, started.engine, rows, journal, checkpoint.name)
    started.engine.stop()
    seconds["run"] = summary.seconds
    stats = collect_stats(started, seconds)
    log.info("%s", summary)
    if args.stats_file:
        text = json.dumps({**stats, "rows": summary.rows, "failed": summary.failed}, indent=1)
        Path(args.stats_file).write_text(text + "\n")
    return 1 if args.strict and summary.failed else 0


def main() -> int:
    """Read the flags, meet the other ranks, run."""
    args = parse_args()
    set_up_logging(args.debug)
    begin = time.perf_counter()
    with join_world(args.device, args.tp) as mesh, ExitStack() as files:
        return run(args, mesh, files, begin)


if __name__ == "__main__":
    run_program(main)
