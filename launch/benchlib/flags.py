"""Flags that several benchmarks have."""

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return number


def add_program_flags(parser: argparse.ArgumentParser) -> None:
    """Add what programs without the engine's flags have in common."""
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--debug", action="store_true", help="tracebacks with errors")
