"""Answer prompts with a DeepSeek-V3-family model split over ranks.

    torchrun --nproc-per-node 8 launch/generate.py --ckpt-path DIR --interactive
    torchrun --nproc-per-node 8 launch/generate.py --ckpt-path DIR --input-file FILE
    torchrun --nproc-per-node 8 launch/generate.py --ckpt-path DIR --prompt TEXT

DIR may be a name on the Hugging Face hub, such as deepseek-ai/DeepSeek-V2-Lite. FILE has one prompt
per line, or OpenAI Batch rows (JSONL). Without torchrun, the program runs on one rank.
"""

import argparse
import logging
import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

from common import tune_for_model, tune_process
from dsv3.checkpoint.directory import check_directory
from dsv3.checkpoint.hub_cache import model_name
from dsv3.checkpoint.source import check_stored_form
from dsv3.config import ModelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.mesh import Mesh, before_joining
from dsv3.distributed.restarts import has_mark, set_mark
from dsv3.engine.engine import Engine, follow
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.start import Started, identify, start
from dsv3.engine.stats import check_stats_file, collect_stats, write_stats_file
from dsv3.errors import CheckpointError, ConfigError
from dsv3.read_files import read_bytes
from dsv3.serve.batch import BatchSummary, prewarm_prompts, run_batch
from dsv3.serve.batch_file import BatchInput
from dsv3.serve.chat import Chat
from dsv3.serve.console import open_console
from dsv3.serve.conversation import OnFull
from dsv3.serve.exporter import serve_metrics
from dsv3.serve.input_history import InputHistory, history_path
from dsv3.serve.journal import BatchJournal
from dsv3.serve.one_shot import Prompt, answer_prompt, read_prompt
from dsv3.serve.progress import Progress
from dsv3.serve.sinks import JournalSink, Sink, TextSink
from dsv3.setting_names import flag
from dsv3.text.chat import AnyFormat, ChatFormat, UnusableFormat
from dsv3.text.defaults import Defaults
from dsv3.text.text_request import digest
from generate_flags import chat_format_of, parse_args, request_defaults
from program import engine_config, join_engine_ranks, run_program, set_up_logging

if TYPE_CHECKING:
    from benchlib.bound import Profile

log = logging.getLogger("dsv3")


@dataclass(frozen=True)
class Task:
    """The task of rank 0: a prompt or rows to answer; a chat has neither."""

    defaults: Defaults
    chat_format: AnyFormat | None = None
    prompt: Prompt | None = None
    rows: BatchInput | None = None
    prewarm: BatchInput | None = None
    journal: BatchJournal | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    on_full: OnFull = "drop"
    history: InputHistory = field(default_factory=lambda: InputHistory(None))


def prepare_format(
    args: argparse.Namespace, checkpoint: Path, config: ModelConfig | None
) -> AnyFormat:
    """Return the checkpoint's format of conversations; raise if a chat needs one and has none."""
    chat_format = chat_format_of(args, checkpoint, config)
    if args.interactive and isinstance(chat_format, UnusableFormat):
        raise CheckpointError(chat_format.reason)
    return chat_format


def check_conversations(rows: BatchInput, chat_format: AnyFormat) -> None:
    """Raise if all rows are conversations and the format is unusable; warn if some are."""
    if not isinstance(chat_format, UnusableFormat):
        return
    are_chats = {row.request.messages is not None for row in rows if row.request is not None}
    if are_chats == {True}:
        raise CheckpointError(chat_format.reason)
    if True in are_chats:
        log.warning("%s: rows with conversations fail", chat_format.reason)


def prepare(
    args: argparse.Namespace,
    checkpoint: Path,
    model: str,
    config: ModelConfig | None,
    files: ExitStack,
) -> Task:
    """Open and check all files of a task before the model is loaded."""
    defaults = request_defaults(args, checkpoint)
    if sys.__stdout__ is None and not args.output_file:
        raise ConfigError("standard output is closed; give an --input-file and an --output-file")
    if args.stats_file:
        check_stats_file(Path(args.stats_file))
    chat_format = prepare_format(args, checkpoint, config)
    separator = args.prompt_separator or "line"
    prewarm = rows = None
    if args.prewarm:
        prewarm = BatchInput(Path(args.prewarm), defaults, separator, "--prewarm")
    if args.input_file:
        rows = BatchInput(Path(args.input_file), defaults, separator, "--input-file")
    warn_of_unused_flags(args, [batch for batch in (prewarm, rows) if batch is not None])
    prompt = journal = None
    if rows is not None:
        check_conversations(rows, chat_format)
        if args.output_file:
            if args.chat_template:  # results of another template must not be resumed
                model += f"-{digest(read_bytes(Path(args.chat_template)))[:8]}"
            output = open_journal(Path(args.output_file), args.overwrite, model)
            journal = files.enter_context(output)
            journal.resume(rows)
    elif not args.interactive:
        prompt = Prompt(args.prompt[0]) if args.prompt else read_prompt()
    keeps_history = args.interactive and not args.no_history
    return Task(
        defaults,
        chat_format,
        prompt,
        rows,
        prewarm,
        journal,
        metrics_port=args.metrics_port,
        metrics_host=args.metrics_host,
        on_full=args.on_full or "drop",
        history=InputHistory(history_path() if keeps_history else None),
    )


def open_journal(path: Path, overwrite: bool, model: str) -> BatchJournal:
    """Open the file of results; --overwrite empties it once, not again when torchrun restarts."""
    mark = f"emptied {os.path.realpath(path)}"
    overwrite = overwrite and not has_mark(mark)
    return BatchJournal(path, overwrite, model, when_emptied=partial(set_mark, mark))


def warn_of_unused_flags(args: argparse.Namespace, inputs: list[BatchInput]) -> None:
    """Log a warning for each flag that has no effect."""
    if args.prompt_separator and all(batch.is_jsonl for batch in inputs):
        log.warning("--prompt-separator changes nothing: the input is JSONL, a row a line")
    names = [name for name in ("top_p", "top_k", "seed") if getattr(args, name) is not None]
    if args.temperature == 0 and names:
        flags = ", ".join(map(flag, names))
        log.warning("%s: only for rows with a temperature, --temperature 0 is greedy", flags)


def chat(task: Task, engine: Engine, name: str) -> None:
    """Run a chat until the user leaves."""
    assert isinstance(task.chat_format, ChatFormat)
    with open_console(task.history) as console:
        Chat(engine, task.chat_format, task.defaults, console, task.on_full).run(name)


def answer(task: Task, engine: Engine) -> BatchSummary:
    """Answer all rows into the journal, or as text on standard output."""
    assert task.rows is not None
    sink: Sink = TextSink(sys.stdout)
    num_done = 0
    if task.journal is not None:
        sink = JournalSink(task.journal, engine.tokenizer)
        num_done = task.journal.num_done
    progress = Progress(task.rows.count(), num_done)
    return run_batch(engine, task.rows, sink, task.chat_format, progress)


def prewarm(rows: BatchInput, chat_format: AnyFormat | None, engine: Engine) -> None:
    """Compute the prompts of a file and keep them cached."""
    num_tokens = engine.prewarm(prewarm_prompts(rows, engine.tokenizer, chat_format))
    log.info("prewarmed: %d tokens are cached and stay so", num_tokens)


def work(task: Task, started: Started, name: str) -> BatchSummary:
    """Run the task on rank 0, and its steps on the other ranks."""
    if started.engine is None:
        follow(started.runner, started.channel)
        return BatchSummary()
    metrics = started.engine.metrics
    serving: AbstractContextManager[object] = nullcontext()
    if task.metrics_port is not None:
        serving = serve_metrics(metrics, task.metrics_host, task.metrics_port)
    try:
        with serving:
            if task.prewarm is not None:
                prewarm(task.prewarm, task.chat_format, started.engine)
            if task.rows is not None:
                return answer(task, started.engine)
            if task.prompt is not None:
                return answer_prompt(started.engine, task.prompt, task.chat_format, task.defaults)
            chat(task, started.engine, name)
            return BatchSummary(seconds=metrics.run_seconds)
    finally:
        started.engine.stop()


def run(args: argparse.Namespace, mesh: Mesh, files: ExitStack, begin: float) -> int:
    """Load the model, answer, report; called on every rank."""
    seconds = {"rendezvous": time.perf_counter() - begin}
    is_first = mesh.layout.rank == 0
    checkpoint = locate_checkpoint(args.ckpt_path, mesh)
    if is_first and not args.ckpt_path:
        log.info("no --ckpt-path: using the demo model in %s", DEMO)
    mesh.watchdog.enter("reading the input", may_rest=True)
    with collective_errors(mesh, "reading the input"):
        if is_first:
            check_directory(checkpoint)
        config = load_model_config(args.config) if args.config else None
        settings = engine_config(args)
        task = Task(Defaults())
        if is_first:
            model = ""
            if args.output_file:
                model = identify(checkpoint, settings, mesh, config)
            else:
                check_stored_form(checkpoint)
            task = prepare(args, checkpoint, model, config, files)
    started = start(checkpoint, settings, mesh, config, args.n_experts)
    tune_for_model(started.config, mesh)
    seconds.update(started.seconds)
    log.info("start-up: %s", ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
    with collective_errors(mesh, "measuring the hardware"):
        profile = start_profile(args.hardware, started) if args.profile else None
    with collective_errors(mesh, "answering"):
        summary = work(task, started, model_name(checkpoint))
        with mesh.watchdog.task("writing the experts' loads"):
            started.runner.finish()
    seconds["run"] = summary.seconds
    if "capture" in seconds:  # of all graphs; most are captured while it runs
        seconds["capture"] = started.runner.capture_seconds
    stats = collect_stats(started, seconds)
    if started.engine is None:
        return 0
    if args.stats_file:
        rows = {"rows": summary.rows, "failed": summary.failed}
        write_stats_file(Path(args.stats_file), {**stats, **rows})
    if task.rows is not None:
        log.info("%s\n%s", summary, started.engine.metrics.summary())
    if profile is not None:
        log.info("\n%s", profile.report(started.engine.metrics.run_seconds))
    return 1 if summary.has_no_answer or (args.strict and summary.failed) else 0


def start_profile(hardware: str, started: Started) -> "Profile":
    """Start to measure every step. A collective."""
    from benchlib.bound import Profile  # imported here: only --profile needs the benchmarks

    return Profile(hardware, started)


def main() -> int:
    """Parse the flags, join the other ranks, run."""
    with before_joining():
        args = parse_args()
        set_up_logging(args.debug, args.log_dir)
    begin = time.perf_counter()
    try:
        with join_engine_ranks(args) as mesh, ExitStack() as files:
            tune_process(mesh)
            return run(args, mesh, files, begin)
    except KeyboardInterrupt:
        log.info("stopped%s", "; run it again to resume" if args.output_file else "")
        raise


if __name__ == "__main__":
    run_program(main)
