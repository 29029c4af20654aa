"""Check this machine's GPUs and measure them; see scripts/gpu_check.sh."""

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

from benchlib.flags import close_name
from benchlib.gpu_check.check import PARTS, run_check
from benchlib.gpu_check.facts import ask_facts, commit_of
from benchlib.gpu_check.jobs import Budget
from benchlib.gpu_check.parts import Part, Setup
from benchlib.gpu_check.report import CheckReport
from dsv3.errors import ConfigError, Interrupted, os_errors_as
from program import Parser, run_program

_ROOT = Path(__file__).resolve().parents[3]
_BUDGET = 560
_REHEARSAL_BUDGET = 1800
_LEAST_BUDGET = 10.0
_EPILOG = """variables:
  OUT     directory of the results, a new or an empty one
          (default: gpu_check_results/DATE-TIME)
  BUDGET  seconds that the whole check may take (default: {budget}, in a rehearsal
          {rehearsal})
  PYTHON  the Python that runs everything (default: python3)

results in OUT:
  summary.txt   the table that is printed at the end
  results.json  the same for programs
  logs/         output of every process
  rows/         a JSON line as each case begins, and one as it ends

exit code: 0 all parts have passed, 1 a part has failed or is incomplete (out of time, or a package
is not installed), 2 wrong usage or no GPU"""


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    default = [f"  {_described(part)}" for part in PARTS if part.by_default]
    named = [f"  {_described(part)}" for part in PARTS if not part.by_default]
    heading = "parts, with their usual and their largest number of seconds on a data-centre GPU:"
    parts = "\n".join([heading, *default, "only by name:", *named])
    parser = Parser(
        prog="scripts/gpu_check.sh",
        description="Is this GPU right, and how fast? Every part is run, a table is printed.",
        epilog=f"{parts}\n\n{_EPILOG.format(budget=_BUDGET, rehearsal=_REHEARSAL_BUDGET)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="parts to run (default: all but sanitize)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run the same parts without a GPU; measures nothing"
    )
    parser.add_argument(
        "--one-shot", action="store_true", help="part ranks: also sums in memory that GPUs share"
    )
    parser.add_argument(
        "--tests", metavar="ARGS", help="parts tests and sanitize: pytest arguments, such as a file"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser.parse_args(arguments)


def _described(part: Part) -> str:
    return f"{part.name:9} {part.typical:4.0f} {part.limit:4.0f}  {part.about}"


def select_parts(names: list[str]) -> list[Part]:
    """Return the named parts in the order of the check; without names, the default parts."""
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no part {name!r}; {close_name(name, known)}")
    return [p for p in PARTS if p.name in names or (p.by_default and not names)]


def read_budget(text: str) -> float:
    """Return the seconds of the variable BUDGET."""
    if not text.isdecimal() or float(text) < _LEAST_BUDGET:
        raise ConfigError(f"BUDGET={text!r} is not a number of {_LEAST_BUDGET:.0f} seconds or more")
    return float(text)


def read_tests(text: str | None) -> tuple[str, ...] | None:
    """Return the arguments of the flag --tests."""
    try:
        return tuple(shlex.split(text)) if text else None
    except ValueError as error:
        raise ConfigError(f"--tests={text}: {error}") from None


def out_folder(text: str) -> Path:
    """Return the directory of the results; refuse a directory that is not empty."""
    folder = Path(text or f"gpu_check_results/{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    with os_errors_as(ConfigError, f"OUT={folder}"):
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"OUT={folder} is not empty; name a new directory")
    return folder


def make_out(folder: Path) -> None:
    """Create the directory of the results."""
    with os_errors_as(ConfigError, f"OUT={folder}"):
        for name in ("logs", "rows"):
            (folder / name).mkdir(parents=True)
        (folder / "summary.txt").write_text("the check has not ended\n")


def main() -> int:
    """Run the check; return its exit code."""
    args = parse_args(sys.argv[1:])
    parts = select_parts(args.parts)
    default = _REHEARSAL_BUDGET if args.rehearse else _BUDGET
    budget = Budget(read_budget(os.environ.get("BUDGET") or str(default)))
    tests = read_tests(args.tests)
    out = out_folder(os.environ.get("OUT", ""))
    print(f"results: {out}", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    facts = ask_facts(_ROOT)
    commit = commit_of(_ROOT)
    machine = [*facts.lines, f"dsv3: {commit}, in {_ROOT}"]
    print("\n".join(machine), flush=True)
    if not facts.gpus and not args.rehearse:
        hint = f" (there is driver {facts.driver}: does torch fit it?)" if facts.driver else ""
        raise ConfigError(f"torch finds no GPU{hint}; --rehearse runs every part without one")
    make_out(out)
    setup = Setup(
        root=_ROOT,
        out=out,
        python=sys.executable,
        facts=facts,
        rehearse=args.rehearse,
        one_shot=args.one_shot,
        tests=tests,
    )
    report = CheckReport(machine, {"commit": commit, "facts": facts.to_row(), "args": sys.argv[1:]})
    return run_check(setup, parts, budget, report)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


if __name__ == "__main__":
    run_program(main)
