"""Errors of reading and using a tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager

from dsv3.errors import CheckpointError


class NoTokenizer(CheckpointError):
    """The checkpoint has no tokenizer, or the library that reads it is not installed."""


@contextmanager
def rust_errors_as(fault: str) -> Iterator[None]:
    """Turn an error of a tokenizer library into a `CheckpointError` that begins with `fault`.

    A damaged file can make the library panic, when it is read or later, when a text uses the
    damaged entry. A panic is a `BaseException` of a type that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{fault}: {error}") from None
        raise
