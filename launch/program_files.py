"""The files that a program's flags name: no output may be an input, or another output."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv3.config_files import DEMO, PRESETS
from dsv3.distributed.launcher import environment_world_size, is_restarted
from dsv3.errors import ConfigError
from dsv3.files import NamedFile, refuse_same_files
from dsv3.streams import STANDARD, is_stream

# Names of a checkpoint's files, whether or not such a file exists yet.
_OF_CHECKPOINTS = re.compile(
    r".*\.(safetensors|index\.json|jinja|py|model|bin|pt|pth|gguf)"
    r"|(.*_)?(config|configuration|manifest|tokenizer|vocab|tokens|tokens_map|template)\.json"
)
_ENGINE_INPUTS = ("--config", "--expert-placement")
_ENGINE_OUTPUTS = ("--record-expert-load",)


def log_file(folder: str | Path, rank: int) -> Path:
    """Return a rank's own file in the directory of `--log-dir`."""
    return Path(folder) / f"rank{rank}.log"


def check_files(
    args: argparse.Namespace,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    prints: bool = True,
) -> None:
    """Compare all files that flags name, before any is opened for writing.

    `-` is standard input or output.

    Args:
        args: the program's flags.
        inputs: other flags that name files to read.
        outputs: other flags that name files to write.
        prints: results go to standard output, which may be a file.

    Raises:
        ConfigError: an output is an input, another output, or a file of the checkpoint.
    """
    checkpoint = Path(getattr(args, "ckpt_path", None) or DEMO)
    written = [*_named(args, [*outputs, *_ENGINE_OUTPUTS]), *_logs(args)]
    stdout = Path("/dev/stdout")
    written = [NamedFile(o.flag, stdout) if o.path == STANDARD else o for o in written]
    for output in written:
        is_there = Path(os.path.realpath(output.path)).parent == Path(os.path.realpath(checkpoint))
        if is_there and _OF_CHECKPOINTS.fullmatch(output.path.name):
            raise ConfigError(
                f"{output}: the name of a checkpoint's file, in its directory; choose another name"
            )
    _refuse_two_readers([file for file in _named(args, inputs) if is_stream(file.path)])
    read = [*_checkpoint_files(checkpoint), *_named(args, [*inputs, *_ENGINE_INPUTS])]
    standard = {name: NamedFile("", Path(f"/dev/std{name}")) for name in ("in", "out", "err")}
    if prints:  # often to the same file as errors
        files = [file for file in read if not is_stream(file.path)]
        refuse_same_files([standard["out"]], files)
    streams = [standard["in"], standard["err"], *([standard["out"]] if prints else [])]
    refuse_same_files(written, [*streams, *read])


def _named(args: argparse.Namespace, flags: Sequence[str]) -> Iterator[NamedFile]:
    for flag in flags:
        value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
        if value:
            preset = PRESETS / f"{value}.yaml"
            is_preset = flag == "--config" and not Path(value).exists()
            yield NamedFile(flag, preset if is_preset else Path(value))


def _refuse_two_readers(inputs: Sequence[NamedFile]) -> None:
    """Raise if a stream would be read twice, or by a restarted job."""
    for number, file in enumerate(inputs):
        if is_restarted():
            raise ConfigError(
                f"{file}: the attempt before this one has read it; give a file where torchrun may "
                "restart the job"
            )
        for other in inputs[:number]:
            if file.path == other.path:
                raise ConfigError(f"{file}: {other.flag} reads it already; give a file")


def _logs(args: argparse.Namespace) -> Iterator[NamedFile]:
    folder = getattr(args, "log_dir", None)
    if folder:
        for rank in range(environment_world_size()):
            yield NamedFile("--log-dir", log_file(folder, rank))


def _checkpoint_files(folder: Path) -> Iterator[NamedFile]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _OF_CHECKPOINTS.fullmatch(path.name) and path.is_file():
            yield NamedFile("--ckpt-path", path)
