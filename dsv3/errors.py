"""The errors a user may meet. Each is one line: what is wrong, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class Dsv3Error(Exception):
    """A failure that is told in one line; `exit_code` is what the program ends with."""

    exit_code = 2
    # Set where rank 0 has the same error to tell.
    told_elsewhere = False
    # Set where every rank has met with it, in one collective.
    is_shared = False


class ConfigError(Dsv3Error, ValueError):
    """A flag, a config field or a layout that cannot be honoured."""


class CheckpointError(Dsv3Error):
    """A checkpoint directory, file or tensor that is missing, damaged or unknown."""


class RequestError(Dsv3Error, ValueError):
    """A single request that cannot be served (a 4xx of the OpenAI format); others go on."""


class OutputError(Dsv3Error):
    """Results that cannot be written."""


class RankError(Dsv3Error):
    """A rank or a device failed."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; raised between steps."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def os_errors_as(kind: type[Dsv3Error], what: str) -> Iterator[None]:
    """Tell what the system refuses to do in one line: what that was, and why."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from None
