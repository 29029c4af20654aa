"""What the programs in `launch/` share: flags, logging, one-line errors, exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from dsv3.engine.config import EngineConfig
from dsv3.errors import ConfigError, Dsv3Error, RankError
from dsv3.parallel.mesh import environment_rank

_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports wrong flags as `ConfigError`, so that one rank tells them and not all."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(f"{message}; see --help")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of model, layout, cache and steps."""
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt-path", help="checkpoint directory (default: the demo model)")
    model.add_argument("--config", help="config.json, DeepSeek's JSON, YAML or a preset's name")
    model.add_argument("--n-experts", type=int, help="checked against the model when given")
    model.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    model.add_argument("--weights", default="auto", help="auto, or fp8: keep FP8 as stored")
    layout = parser.add_argument_group("layout")
    layout.add_argument("--device", default="auto", help="auto, cpu or cuda")
    layout.add_argument("--tp", type=int, default=0, help="tensor-parallel ranks (default: all)")
    cache = parser.add_argument_group("cache and attention")
    cache.add_argument("--attn-impl", default="auto", help="auto, naive or absorb")
    cache.add_argument("--kv-shard", default="tokens", help="tokens (sharded) or none (replicated)")
    cache.add_argument("--kv-dtype", default="auto", help="auto, fp32 or bf16")
    cache.add_argument(
        "--kv-cache-size",
        default="auto",
        help="auto, bytes per rank (4GiB) or tokens of the whole group (65536tok)",
    )
    cache.add_argument(
        "--max-seq-len", type=int, default=0, help="longest context (0: the model's)"
    )
    cache.add_argument(
        "--no-prefix-reuse", dest="prefix_reuse", action="store_false", help="reuse no prefixes"
    )
    cache.add_argument("--eviction", default="lru", help="cost or lru")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--max-batch-tokens", type=int, default=2048, help="new tokens of a step")
    steps.add_argument("--max-running", type=int, default=64, help="sequences at a time")
    steps.add_argument("--pipeline-depth", type=int, default=-1, help="0, 1 or -1: as the device")
    parser.add_argument("--debug", action="store_true", help="log more; tracebacks with errors")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Return the settings; they check themselves."""
    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig)})


def set_up_logging(debug: bool) -> None:
    """Log to stderr: rank 0 its progress, the others only what is wrong, each with its name."""
    rank = environment_rank()
    quiet = logging.WARNING if rank else logging.INFO
    logging.basicConfig(
        level=logging.DEBUG if debug else quiet,
        format=f"rank {rank}: %(message)s" if rank or debug else "%(message)s",
        stream=sys.stderr,
        force=True,
    )


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit: 0 done, 2 wrong usage or checkpoint, 3 a rank or device failed.

    Our one line goes to stderr before torchrun's report; `record` names the cause in that report.
    """
    debug = "--debug" in sys.argv
    try:
        code = record(main)() or 0
    except Dsv3Error as error:
        if debug:
            raise
        if not error.told_elsewhere:
            rank = environment_rank()
            if rank == 0:
                sys.stderr.write(f"error: {error}" + "\n")
            elif isinstance(error, RankError):
                sys.stderr.write(f"error: rank {rank}: {error}" + "\n")
        code = error.exit_code
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        text = str(error).strip().split("\n")[0]
        where = f"rank {environment_rank()}: {type(error).__name__}: {text}"
        sys.stderr.write(f"error: {where} (--debug shows more)" + "\n")
        code = RankError.exit_code
    sys.stdout.flush()
    sys.exit(code)
