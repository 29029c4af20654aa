"""Flags shared by several benchmarks."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from benchlib.workload import Lengths
from dsv3.errors import ConfigError

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


def close_name(name: str, known: Sequence[str]) -> str:
    """Return the end of an error about an unknown name: the nearest one, or all."""
    close = get_close_matches(name, known)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def lengths(text: str) -> Lengths:
    """Parse a distribution of lengths."""
    try:
        return Lengths.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of random requests."""
    add = parser.add_argument
    add("--requests", type=at_least(1), default=64, help="number of requests")
    forms = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    add("--prompt-len", type=lengths, default="32", help=f"tokens of prompts: {forms}")
    add("--answer-len", type=lengths, default="32", help=f"tokens of answers: {forms}")
    add("--seed", type=int, default=0, help="of the random requests (default: 0)")
