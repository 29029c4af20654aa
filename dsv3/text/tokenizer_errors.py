"""The ways in which reading and using a tokenizer fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from dsv3.errors import CheckpointError


class NoTokenizer(CheckpointError):
    """A checkpoint without a tokenizer, or without the library that reads it."""


@contextmanager
def rust_errors_as(fault: str) -> Iterator[None]:
    """Turn an error of a tokenizer library into a `CheckpointError` that begins with `fault`.

    A damaged file can make the library panic, while it is read or only when a text comes to the
    damaged place. A panic is a `BaseException` of a type that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{fault}: {error}") from None
        raise
