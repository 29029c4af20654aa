"""Errors for users. The message is one line: the fault, its place, and the remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

MAX_LINE = 400  # characters of an error or a warning
MAX_VALUE = 60  # characters of a value in a message
# Characters that control a terminal or cannot be encoded: control characters (C0, DEL, C1), line
# and paragraph separators, directional marks, halves of surrogate pairs.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_DIRECTIONS = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNSAFE = re.compile(rf"[{_CONTROLS}{_DIRECTIONS}\ud800-\udfff]")
_BREAK = re.compile(r"\s*[\r\n]\s*")


def one_line(text: str) -> str:
    """Return `text` as one line of printable characters, at most `MAX_LINE` of them.

    Other characters are escaped as in Python; the middle of an overlong line is omitted.
    """
    text = shorten(text.strip(), MAX_LINE)  # first, so that omitted text is not escaped
    return shorten(_UNSAFE.sub(_escape, _BREAK.sub(" ", text)), MAX_LINE)


def printable(text: str) -> str:
    """Return `text` with control characters escaped, except newlines and tabs."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match), text)


def shorten(text: str, limit: int = MAX_VALUE) -> str:
    """Return `text` if it has at most `limit` characters, otherwise its beginning and end."""
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 3
    return f"{text[: limit - 3 - tail]}...{text[len(text) - tail :]}"


def _escape(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


class Dsv3Error(Exception):
    """A failure that is reported in one line; `exit_code` is the program's exit code.

    The text may contain names and values from files; it is always one short line of printable
    characters.
    """

    exit_code = 2
    # Set if rank 0 reports the same error.
    reported_by_rank0 = False
    # Set if all ranks have the same error, from one collective.
    seen_by_all_ranks = False

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(Dsv3Error, ValueError):
    """A flag, a config field or a layout is invalid."""


class CheckpointError(Dsv3Error):
    """A checkpoint directory, file or tensor is missing, damaged or unknown."""


class RequestError(Dsv3Error, ValueError):
    """A single request is invalid (status 4xx of the OpenAI format); others are not affected."""


class OutputError(Dsv3Error):
    """Results cannot be written."""


class RankError(Dsv3Error):
    """A rank or a device failed."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; raised between steps."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number


@contextmanager
def os_errors_as(kind: type[Dsv3Error], prefix: str) -> Iterator[None]:
    """Convert OSError into a one-line Dsv3Error of a kind; the reason follows `prefix`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{prefix}: {error.strerror or error}") from None


def describe_error(error: BaseException) -> str:
    """Return an error in one line: a Dsv3Error's message, the type and message of others."""
    if isinstance(error, Dsv3Error):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}")
    text = str(error).strip().split("\n")[0]
    kind = type(error).__name__
    line = one_line(f"{kind}: {text}" if text else kind)
    return f"{line} (debug logging shows more)"
