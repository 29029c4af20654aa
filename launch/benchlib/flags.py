"""Flags shared by several benchmarks."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Share:
    """Every `count`-th item from number `index` on: one of `count` equal shares of a list."""

    index: int
    count: int

    def of(self, items: Sequence[_Item]) -> list[_Item]:
        """Return the items of this share."""
        return list(items[self.index :: self.count])


def share(text: str) -> Share:
    """Parse a share written I/N, with I from 0 to N - 1."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return Share(int(match[1]), int(match[2]))


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
