"""Flags shared by several benchmarks."""

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return number


def add_program_flags(parser: argparse.ArgumentParser) -> None:
    """Add the common flags of benchmarks that do not have the engine's flags."""
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
