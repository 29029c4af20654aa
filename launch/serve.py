"""Serve a DeepSeek-V3-family model, split over ranks, in OpenAI's and Anthropic's HTTP formats.

    torchrun --nproc-per-node 8 launch/serve.py --ckpt-path DIR --port 8000

DIR may be a name on the Hugging Face hub. Rank 0 serves, and all ranks run the model. A chat page
is at `/`. Needs the extra `serve` (pip install "dsv3[serve]").
"""

import argparse
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

from common import tune_for_model, tune_process
from dsv3.checkpoint.directory import check_directory
from dsv3.checkpoint.hub_cache import model_name
from dsv3.config import ModelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.launcher import environment_rank
from dsv3.distributed.mesh import Mesh, before_joining
from dsv3.engine.engine import HASTY_SAVE_SECONDS, follow
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.start import Started, identify, start
from dsv3.errors import describe_error
from dsv3.serve.batch import prewarm_prompts
from dsv3.serve.batch_file import BatchInput
from dsv3.serve.front import Front, Limits, Served
from dsv3.settings import EngineConfig
from generate_flags import chat_format_of, request_defaults
from process import drain_at_signals
from program import engine_config, join_engine_ranks, run_program, set_up_logging
from serve_flags import api_keys, parse_args

if TYPE_CHECKING:
    import socket

log = logging.getLogger("dsv3")


def prepare(
    args: argparse.Namespace,
    checkpoint: Path,
    settings: EngineConfig,
    mesh: Mesh,
    config: ModelConfig | None,
) -> Front:
    """Check the checkpoint and the flags before the model is loaded."""
    check_directory(checkpoint)
    served = Served(
        model=args.served_model_name or model_name(checkpoint),
        fingerprint=identify(checkpoint, settings, mesh, config),
        chat_format=chat_format_of(args, checkpoint, config),
        defaults=request_defaults(args, checkpoint),
    )
    limits = Limits(
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_bytes,
        request_seconds=args.request_seconds,
    )
    return Front(served, limits)


def open_server(
    args: argparse.Namespace, front: Front, listener: "socket.socket", stack: ExitStack
) -> None:
    """Serve from a thread until the stack is closed; until the model is loaded, say so."""
    from dsv3.serve.http_app import make_app
    from dsv3.serve.http_server import HttpServer

    server = HttpServer(make_app(front, api_keys(args), args.cors or ()), listener)
    front.attach(server.loop)
    stack.enter_context(server)


def serve(args: argparse.Namespace, front: Front | None, started: Started) -> None:
    """Answer requests on rank 0 until a signal ends it, and run the steps on the other ranks."""
    engine = started.engine
    if front is None or engine is None:
        with drain_at_signals(lambda: None):  # rank 0 drains, and then lets the others go
            follow(started.runner, started.channel)
        return
    started.mesh.watchdog.job_end.before_end = front.fail
    try:
        with drain_at_signals(lambda: front.drain(args.drain_seconds)):
            if args.prewarm:
                rows = BatchInput(Path(args.prewarm), front.served.defaults, flag="--prewarm")
                prompts = prewarm_prompts(rows, engine.tokenizer, front.served.chat_format)
                log.info("prewarmed: %d tokens are cached", engine.prewarm(prompts))
            log.info("ready: %s", front.served.model)
            layout = started.mesh.layout
            front.serve(
                engine,
                {"tp": str(layout.tp), "dp": str(layout.dp), "kv_shard": args.kv_shard},
            )
    except Exception as error:
        front.fail(describe_error(error))
        raise
    finally:
        engine.stop(max(HASTY_SAVE_SECONDS, front.drain_seconds_left))
    log.info("stopped\n%s", engine.metrics.summary())


def run(
    args: argparse.Namespace, mesh: Mesh, listener: "socket.socket | None", stack: ExitStack
) -> int:
    """Load the model and serve it; called on every rank."""
    is_first = mesh.layout.rank == 0
    checkpoint = locate_checkpoint(args.ckpt_path, mesh)
    if is_first and not args.ckpt_path:
        log.info("no --ckpt-path: using the demo model in %s", DEMO)
    front = None
    mesh.watchdog.enter("reading the checkpoint", may_rest=True)
    with collective_errors(mesh, "reading the checkpoint"):
        config = load_model_config(args.config) if args.config else None
        settings = engine_config(args)
        if listener is not None:
            front = prepare(args, checkpoint, settings, mesh, config)
            open_server(args, front, listener, stack)
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    begin = time.perf_counter()
    started = start(checkpoint, settings, mesh, config, args.n_experts)
    tune_for_model(started.config, mesh)
    log.info("start-up: %.1f s", time.perf_counter() - begin)
    with collective_errors(mesh, "serving"):
        serve(args, front, started)
        with mesh.watchdog.task("writing the experts' loads"):
            started.runner.finish()
    return 0


def open_port(args: argparse.Namespace, stack: ExitStack) -> "socket.socket | None":
    """Listen on rank 0, before the others wait for it; None on other ranks."""
    from dsv3.serve.http_server import listen

    return stack.enter_context(listen(args.host, args.port)) if environment_rank() == 0 else None


def main() -> int:
    """Parse the flags, join the other ranks, serve."""
    with ExitStack() as stack:
        with before_joining():
            args = parse_args()
            set_up_logging(args.debug, args.log_dir)
            listener = open_port(args, stack)
        mesh = stack.enter_context(join_engine_ranks(args))
        tune_process(mesh)
        return run(args, mesh, listener, stack)


if __name__ == "__main__":
    run_program(main)
