"""Flags, logging, one-line errors and exit codes of the programs in `launch/`."""

import argparse
import errno
import logging
import os
import re
import stat
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from dsv3.distributed.failure_report import leave_report, reason_of
from dsv3.distributed.launcher import environment_rank
from dsv3.distributed.mesh import Mesh, join_world
from dsv3.errors import (
    ConfigError,
    Dsv3Error,
    RankError,
    one_line,
    os_errors_as,
    printable,
)
from dsv3.setting_names import flag
from dsv3.settings import EngineConfig, allowed_words
from process import end_at_signals, prepare_process
from program_files import log_file

_INTERRUPTED = 130
# torchrun ends all ranks as soon as one has failed. A rank whose error rank 0 reports waits this
# many seconds, so that rank 0 can report it.
_REPORT_SECONDS = 2.0

_MAY_BE_EMPTY = ("system",)  # no system message


class _Help(argparse.HelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        text = action.help
        if isinstance(value, bool | None) or value in ("", argparse.SUPPRESS):
            return text
        if text is None or "(default" in text or not action.option_strings or action.const:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Argument parser that raises ConfigError, so that one rank reports a wrong flag, not all."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **more})

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting; suggest a flag for a misspelt one."""
        misspelt = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        flags = self._option_string_actions
        close = get_close_matches(misspelt[1], flags, cutoff=0.75) if misspelt else []
        hint = f"did you mean {close[0]}?" if close else "see --help"
        raise ConfigError(f"{message}; {hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read the flags; an empty text, as of a variable that is not set, is refused."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if value == "" and action.default != "" and action.dest not in _MAY_BE_EMPTY:
                raise ConfigError(f"{flag(action.dest)} is empty; give a value, or leave it out")
        return found, rest

    def print_help(self, file: Any = None) -> None:
        """Print the help once, not once a rank."""
        if environment_rank() == 0:
            super().print_help(file)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the common flags of model, layout, cache and steps; one per field of `EngineConfig`."""
    groups = {name: parser.add_argument_group(name) for name in ("model", "layout")}
    model, layout = groups.values()
    text = "checkpoint directory, or owner/name[@revision] on the Hugging Face hub (default: demo)"
    model.add_argument("--ckpt-path", help=text)
    model.add_argument("--config", help="config.json, DeepSeek's JSON, YAML or a preset's name")
    model.add_argument("--n-experts", type=int, help="checked against the model when given")
    layout.add_argument("--device", default="auto", help="auto, cpu or cuda")
    layout.add_argument("--tp", type=int, default=0, help="tensor-parallel ranks (0: all)")
    layout.add_argument("--dp", type=int, default=1, help="data-parallel groups of them")
    text = "seconds after which a rank that hangs ends the job"
    layout.add_argument("--rank-timeout", type=float, default=60.0, help=text)
    for f in fields(EngineConfig):
        name = f.metadata["group"]
        text = f.metadata["about"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        if f.default is True:
            groups[name].add_argument(
                flag(f"no_{f.name}"), dest=f.name, action="store_false", help=text
            )
        elif f.default is False:
            groups[name].add_argument(flag(f.name), action="store_true", help=text)
        else:
            words = allowed_words(f)  # EngineConfig checks them
            metavar = f"{{{','.join(words)}}}" if words else None
            kind = str if words else f.type
            groups[name].add_argument(
                flag(f.name), type=kind, default=f.default, metavar=metavar, help=text
            )
    parser.add_argument("--log-dir", metavar="DIR", help="also log here, a file for every rank")
    parser.add_argument("--debug", action="store_true", help="log more; tracebacks with errors")


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of programs that can measure their steps."""
    text = "measure the time of every operation and compare it with its roofline floor"
    parser.add_argument("--profile", action="store_true", help=text)
    text = "ceilings of --profile: measure (on this machine), or a device's name, such as h100"
    parser.add_argument("--hardware", default="measure", help=text)


def check_profile_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError if ceilings are given that nothing is compared with."""
    if args.hardware != "measure" and not args.profile:
        raise ConfigError("--hardware gives the ceilings of --profile; add that, or leave it out")


class _Flags(EngineConfig):
    """Settings whose errors name flags."""

    def named(self, field: str) -> str:
        """Return the flag of a field."""
        return flag(field)

    def given(self, field: str) -> str:
        """Return the flag of a field with its value."""
        value = getattr(self, field)
        if isinstance(value, bool):
            return flag(field if value else f"no_{field}")
        return super().given(field)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Return the settings; they check themselves."""
    return _Flags(**{f.name: getattr(args, f.name) for f in fields(EngineConfig)})


def join_ranks(
    device: str, tp: int = 0, dp: int = 1, one_shot: bool = False, **settings: Any
) -> AbstractContextManager[Mesh]:
    """Return `join_world` for a program: errors name flags, and signals end the job in order."""
    return join_world(
        device, tp, dp, name=flag, one_shot=one_shot, around=end_at_signals, **settings
    )


def join_engine_ranks(
    args: argparse.Namespace, device: str | None = None
) -> AbstractContextManager[Mesh]:
    """Return `join_ranks` with the flags of `add_engine_flags`, most of which ranks must share.

    Args:
        args: the flags.
        device: replaces that of the flags.
    """
    same = {name: str(getattr(args, name, None)) for name in ("profile", "rank_timeout")}
    return join_ranks(
        device or args.device,
        args.tp,
        args.dp,
        args.one_shot,
        rank_timeout=args.rank_timeout,
        settings=EngineConfig.common(vars(args)) | same,
        cpu_exchange=args.cpu_exchange,
    )


class _Printable(logging.Formatter):
    """Escapes control characters in the log; a warning is one line of bounded length."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record; the stacks that may follow are not part of it."""
        text = super().formatMessage(record)
        return one_line(text) if record.levelno >= logging.WARNING else printable(text)

    def formatException(self, ei: Any) -> str:
        """Return the stacks of an exception."""
        return printable(super().formatException(ei))


def set_up_logging(debug: bool, folder: str | None = None) -> None:
    """Log to stderr: progress of rank 0, and warnings of all ranks with their names.

    With a folder, every rank also writes everything to its own file there.
    """
    rank = environment_rank()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    named = f"rank {rank}: %(message)s" if rank or debug else "%(message)s"
    handlers[0].setFormatter(_Printable(named))
    handlers[0].setLevel(logging.DEBUG if debug else logging.WARNING if rank else logging.INFO)
    if folder:
        with os_errors_as(ConfigError, f"--log-dir={folder}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        with os_errors_as(ConfigError, f"--log-dir={log_file(folder, rank)}"):
            handlers.append(_LogFile(log_file(folder, rank)))
        handlers[1].setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, handlers=handlers, force=True)


class _LogFile(logging.FileHandler):
    """Appends to a regular file, and follows no link to another one."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        if Path(self.baseFilename).is_symlink():
            raise OSError(errno.ELOOP, "a link; remove it, or choose another directory")
        descriptor = os.open(self.baseFilename, flags | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file")
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its result, or 2: wrong usage or checkpoint, 3: a rank failed.

    The error's line goes to stderr, and into the report that torchrun prints after it.
    """
    prepare_process()
    try:
        code = main() or 0
    except KeyboardInterrupt as asked:
        code = getattr(asked, "exit_code", _INTERRUPTED)
    except Exception as error:
        code = error.exit_code if isinstance(error, Dsv3Error) else RankError.exit_code
        _report(error, "--debug" in sys.argv)
    try:
        if sys.stdout is not None:  # it may have been closed from the start
            sys.stdout.flush()
    except OSError:  # the reader is gone; the interpreter would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _report(error: Exception, debug: bool) -> None:
    """Write an error as one line; with --debug, its traceback too."""
    rank = 0
    with suppress(ConfigError):  # RANK may be the very fault that is reported
        rank = environment_rank()
    is_reported = getattr(error, "reported_by_rank0", False)
    name = "" if rank == 0 or is_reported else f"rank {rank}: "
    line = f"error: {name}{reason_of(error)}"
    details = printable("".join(traceback.format_exception(error)))
    leave_report(line, details if debug else line)
    if debug:
        sys.stderr.write(details)
    if rank != 0 and (is_reported or isinstance(error, ConfigError)):
        time.sleep(_REPORT_SECONDS)  # torchrun ends this rank if rank 0 fails with the same error
    if not is_reported:
        sys.stderr.write(line + "\n")
