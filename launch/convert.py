"""Convert a checkpoint: into one file per rank, back to Hugging Face, or to another weight type.

    convert.py --hf-ckpt-path DIR --save-path OUT --model-parallel 8      a file for each of 8 ranks
    convert.py --hf-ckpt-path DIR --save-path OUT --tp 4 --dp 8           ... of 4 x 8 ranks
    convert.py --hf-ckpt-path DIR --save-path OUT --to hf                 Hugging Face again
    convert.py --hf-ckpt-path DIR --save-path OUT --to bf16               FP8 weights to BF16
    convert.py --hf-ckpt-path DIR --save-path OUT --to fp8                BF16 weights to FP8
    convert.py --hf-ckpt-path DIR --save-path OUT --to int8               ... to int8, a scale a row
    convert.py --hf-ckpt-path DIR --save-path OUT --to int4               ... to int4, of 32 columns
    convert.py --hf-ckpt-path DIR --save-path OUT --to mixed --bits 4.5 --sensitivity FILE
    convert.py --hf-ckpt-path OUT --verify                                check against its digests

DIR may be a Hugging Face directory, one that this program made for any number of ranks, or one
that DeepSeek's convert.py made (give --config then); or a name on the Hugging Face hub, such as
deepseek-ai/DeepSeek-V2-Lite, which is downloaded into the hub's cache first. The casts (`--to`
bf16, fp8, int8, int4) write a Hugging Face directory, or rank files where a layout is given. An
interrupted conversion resumes when the same command is given again.

int8 and int4 are the packed format of compressed-tensors, which vLLM, SGLang and transformers read.
Router, norms, embeddings, heads, kv_b_proj and the weights of the indexers' heads stay as they are
(FP8 ones become BF16); an MTP layer's copies of embedding and head are left out. mixed keeps FP8
weights in FP8, unless the budget makes integers of them.

A layout is tp ranks times dp data-parallel groups: dense layers are split over tp, routed experts
over all ranks. A rank's file holds all that the rank needs, so that a host needs only the files
of its own ranks; dense layers are therefore written dp times (--dry-run shows the bytes).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

from tqdm import tqdm

from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.convert import check, clean_up_after, convert
from dsv3.checkpoint.directory import check_directory
from dsv3.checkpoint.hub import fetch, resolve
from dsv3.checkpoint.hub_cache import hub_name, repository_folder
from dsv3.checkpoint.hub_files import Download
from dsv3.checkpoint.jobs import Cast, uniform_kinds
from dsv3.checkpoint.mixed import mixed_kinds
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.report import describe, in_units
from dsv3.checkpoint.side_files import has_tokenizer, is_document
from dsv3.checkpoint.source import open_source
from dsv3.checkpoint.target import OutputDirectory, is_complete
from dsv3.checkpoint.verify import check_kinds, verify_against, verify_digests
from dsv3.checkpoint.workers import default_workers
from dsv3.config import ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.config_integers import IntegerKind
from dsv3.errors import (
    ConfigError,
    Dsv3Error,
    RankError,
    describe_error,
    printable,
)
from dsv3.setting_names import flag
from process import open_closed_streams, raise_at_ctrl_c

_GROUP = 32  # columns that share a scale in int4
_CASTS = {
    "layout": Cast.NONE,
    "hf": Cast.NONE,
    "bf16": Cast.BF16,
    "fp8": Cast.FP8,
    "int8": Cast.INTEGERS,
    "int4": Cast.INTEGERS,
    "mixed": Cast.MIXED,
}


# Flags that mean nothing without --save-path.
_WRITING = (
    *("model_parallel", "tp", "dp", "ep", "scale_fmt", "group_size", "bits", "sensitivity"),
    *("experts_by_layer", "to", "no_mtp", "dry_run", "overwrite"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags of DeepSeek's convert.py keep their names and meaning."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "checkpoint to read, or owner/name[@revision] on the Hugging Face hub"
    add("--hf-ckpt-path", required=True, metavar="DIR", help=text)
    add("--save-path", metavar="OUT", help="directory to write or resume")
    add("--model-parallel", type=int, metavar="N", help="the same as --tp N")
    add("--tp", type=int, metavar="T", help="write files for T tensor-parallel ranks")
    add("--dp", type=int, metavar="D", help="write files for D data-parallel groups (default: 1)")
    add("--ep", type=int, metavar="E", help="ranks that share the routed experts: always T x D")
    add("--n-experts", type=int, metavar="E", help="expected routed experts of the checkpoint")
    add(
        "--to",
        choices=tuple(_CASTS),
        default="layout",
        help="rank files (default), a Hugging Face directory, or weights cast to another type",
    )
    add("--scale-fmt", choices=("ue8m0",), help="with --to fp8: round scales to powers of two")
    add("--group-size", type=int, choices=(32, 64, 128), help=f"with --to int4 (default: {_GROUP})")
    add("--bits", type=float, help="with --to mixed: most bits per weight, scales included")
    add("--sensitivity", metavar="FILE", help="with --to mixed: result of scripts/sensitivity.py")
    text = "with --to mixed: routed experts differ between layers (not for transformers)"
    add("--experts-by-layer", action="store_true", help=text)
    add("--config", metavar="FILE", help="config.json, DeepSeek's JSON, YAML or a preset's name")
    add("--no-mtp", action="store_true", help="leave out the layers that draft tokens")
    add("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the files to write; write nothing")
    add("--verify", action="store_true", help="read the result back and compare every byte")
    add("--overwrite", action="store_true", help="replace an existing checkpoint in OUT")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    _check_values(parser, args)
    _check_args(parser, args)
    return args


def _check_values(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse empty texts, as of variables that are not set, and numbers below 1."""
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"{flag(name)} is empty; give a value, or leave it out")
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            parser.error(f"{flag(name)} must be at least 1")
    args.save_path = None if args.save_path is None else Path(args.save_path)


def _check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error for flags that contradict each other."""
    if args.save_path is None:
        if not args.verify:
            parser.error("give --save-path (or --verify alone, to check a converted directory)")
        for name in _WRITING:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"{flag(name)} is for writing; give --save-path, or leave it out")
        return
    has_layout = [args.tp, args.dp, args.ep] != [None] * 3
    if args.model_parallel is not None and has_layout:
        parser.error("--model-parallel N is --tp N; give --tp, --dp and --ep without it")
    has_layout = has_layout or args.model_parallel is not None
    if args.to == "layout" and not has_layout:
        parser.error("give --model-parallel N, or --tp T --dp D, or --to hf|bf16|...")
    if args.to == "hf" and has_layout:
        parser.error("--to hf writes one whole checkpoint; leave --model-parallel out, --tp, --dp")
    if args.scale_fmt and args.to != "fp8":
        parser.error("--scale-fmt goes with --to fp8")
    _check_integers(parser, args)
    if args.save_path.resolve() == Path(args.hf_ckpt_path).resolve():
        parser.error("--save-path must not be the directory that is read")


def _check_integers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error for flags that do not go with the type of integers."""
    if args.group_size and args.to != "int4":
        parser.error("--group-size goes with --to int4")
    is_mixed = args.to == "mixed"
    if is_mixed != (args.bits is not None) or is_mixed != (args.sensitivity is not None):
        parser.error("--to mixed, --bits B and --sensitivity FILE go together")
    if args.experts_by_layer and not is_mixed:
        parser.error("--experts-by-layer goes with --to mixed")
    if is_mixed and not 0 < args.bits < float("inf"):
        parser.error(f"--bits={args.bits:g} must be a number of bits, such as 4.5")


def main() -> int:
    """Run the command; print failures in one line."""
    args = parse_args()
    try:
        run(args)
    except (Dsv3Error, OSError) as error:
        if args.debug:
            raise
        print_error(error)
        return error.exit_code if isinstance(error, Dsv3Error) else 2
    except KeyboardInterrupt:
        print("stopped; run it again to resume", file=sys.stderr)
        return 130
    return 0


def print_error(error: Exception) -> None:
    """Print an error in one line on standard error."""
    print(f"error: {describe_error(error)}", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Open the source checkpoint, then verify, convert or print the plan."""
    path = locate(args)
    check_directory(path)
    config = None if args.config is None else load_model_config(args.config)
    with open_source(path, config) as source:
        if source.config.warning:
            print(f"warning: {source.config.warning}", file=sys.stderr)
        experts = source.config.n_routed_experts
        if args.n_experts not in (None, experts):
            raise ConfigError(f"--n-experts {args.n_experts}: the checkpoint has {experts} experts")
        if args.save_path is None:
            with progress_bar(source.num_bytes, "verify") as advance:
                digests = verify_digests(source, args.workers, advance)
            print_lines(f"verified: {source.path} matches the digests of {digests}")
            return
        layout = read_layout(args)
        plan = make_plan(
            source,
            layout,
            _CASTS[args.to],
            args.scale_fmt,
            keeps_mtp=not args.no_mtp,
            integers=read_kinds(args, source),
        )
        for line in source_warnings(source):
            print(f"warning: {line}", file=sys.stderr)
        target = OutputDirectory(args.save_path, source, plan, args.overwrite, inputs(args))
        if args.dry_run:
            print_plan(args, source, target)
        else:
            write(args, source, target)


def locate(args: argparse.Namespace) -> Path:
    """Return the directory to read; a hub name is downloaded first."""
    name = hub_name(args.hf_ckpt_path)
    if name is None:
        path = Path(args.hf_ckpt_path)
    else:
        say = partial(print_lines, file=sys.stderr)
        path = fetch(name, resolve(name), Download(say))
    repository = repository_folder(path)
    if repository is not None and args.save_path is not None:
        cache = repository.parent.resolve()
        save_path = args.save_path.resolve()
        if cache in (save_path, *save_path.parents):
            raise ConfigError(f"--save-path={args.save_path}: in the cache of the hub, {cache}")
    return path


def read_layout(args: argparse.Namespace) -> ParallelConfig | None:
    """Return the layout to write files for; None for a Hugging Face directory."""
    if args.model_parallel is not None:
        return ParallelConfig(world_size=args.model_parallel)
    if args.tp is None and args.dp is None and args.ep is None:
        return None
    dp = 1 if args.dp is None else args.dp
    tp = args.tp if args.tp is not None else (args.ep or dp) // max(dp, 1)
    if args.ep not in (None, tp * dp):
        raise ConfigError(f"--ep={args.ep} must be tp={tp} x dp={dp} = {tp * dp}, or left out")
    return ParallelConfig(world_size=tp * dp, tp=tp, dp=dp)


def read_kinds(args: argparse.Namespace, source: Source) -> Mapping[str, IntegerKind]:
    """Return the weights to cast to integers, with their kinds."""
    if args.to == "int8":
        return uniform_kinds(source, 8, 0)
    if args.to == "int4":
        return uniform_kinds(source, 4, args.group_size or _GROUP)
    if args.to == "mixed":
        file = Path(args.sensitivity)
        return mixed_kinds(source, args.bits, file, not args.no_mtp, args.experts_by_layer)
    return {}


def inputs(args: argparse.Namespace) -> list[Path]:
    """Return the files that are read in addition to the checkpoint."""
    path = Path(args.config or "")
    names = ("config.json", "generation_config.json")  # of a directory
    return [file for file in (path, *(path / name for name in names)) if file.is_file()]


def print_plan(args: argparse.Namespace, source: Source, target: OutputDirectory) -> None:
    """Print the files to write, replace and keep; raise the error that would stop a conversion."""
    space = target.disk_space(target.read_record())
    print_lines(*describe(source, target.plan, *space))
    if is_complete(target.folder) and not args.overwrite:
        with open_source(target.folder) as result:
            check_kinds(target.plan, result)
        print_lines(f"done: {target.folder} is complete already; it would only be verified")
        return
    survey = check(target)
    if survey.replaces:
        print_lines(f"replaced in {target.folder}: {', '.join(survey.replaces)}")
    if survey.kept:
        print_lines(f"kept in {target.folder}: {', '.join(survey.kept)}")
    if args.verify:
        print("then every byte is read back and compared")


def write(args: argparse.Namespace, source: Source, target: OutputDirectory) -> None:
    """Convert, or compare a finished conversion with the source; then report."""
    if not has_tokenizer(source.path):
        print_lines(f"warning: {source.path} has no tokenizer files", file=sys.stderr)
    plan = target.plan
    start = time.monotonic()
    is_done = is_complete(args.save_path) and not args.overwrite
    if not is_done:
        with progress_bar(plan.tensor_bytes, "convert") as advance:
            result = convert(
                source,
                plan,
                args.save_path,
                args.workers,
                advance,
                overwrite=args.overwrite,
                inputs=inputs(args),
            )
        seconds = time.monotonic() - start
        resumed = f" ({in_units(result.resumed)} were there)" if result.resumed else ""
        print_lines(
            f"{args.save_path}: {len(plan.files)} files, {in_units(plan.num_bytes)}{resumed} in "
            f"{seconds:.1f} s, {in_units(result.written / seconds)}/s"
        )
    if is_done or args.verify:
        with (
            clean_up_after(target),
            progress_bar(plan.tensor_bytes, "verify") as advance,
            open_source(args.save_path) as written,
        ):
            verify_against(source, plan, written, args.workers, advance)
        print_lines(f"verified: {args.save_path} is {source.path}, bit for bit")
    print_differences(target)


def print_differences(target: OutputDirectory) -> None:
    """Print the files other than weights that differ from the source's."""
    names = target.differing_files()
    if documents := [name for name in names if is_document(name)]:
        print_lines(f"kept in {target.folder}, other than in the source: {', '.join(documents)}")
    if others := ", ".join(name for name in names if not is_document(name)):
        line = f"warning: {target.folder}: read with the model, but not as in the source: {others}"
        print_lines(line, file=sys.stderr)


def print_lines(*lines: str, file: TextIO | None = None) -> None:
    """Print lines with control characters escaped, since file names may hold any."""
    print("\n".join(map(printable, lines)), file=file)


@contextmanager
def progress_bar(num_bytes: int, title: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if standard error is a terminal; yield a function to advance it."""
    with tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=None) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def program() -> int:
    """Run the command; print an unexpected error in one line, too."""
    raise_at_ctrl_c()
    open_closed_streams()
    try:
        return main()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        print_error(error)
        return RankError.exit_code


if __name__ == "__main__":
    sys.exit(program())
