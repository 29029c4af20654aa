"""How this process was launched: the environment that torchrun, or a user by hand, gives it.

Nothing else in the project reads a rank from the environment.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

from dsv3.errors import ConfigError, shorten

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's rank and the number of ranks; a world of one without torchrun."""

    rank: int
    world_size: int

    @classmethod
    def read(cls) -> "Launch":
        """Read the environment.

        Raises:
            ConfigError: a variable is not a number.
        """
        return cls(_number("RANK", "0"), _number("WORLD_SIZE", "1"))


class Place(NamedTuple):
    """Where the ranks find each other: the store of torchrun, or of rank 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def read(cls) -> "Place":
        """Read the environment.

        Raises:
            ConfigError: a variable is missing, or is no port.
        """
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(f"{name} is not set: start with torchrun")
        port = _number("MASTER_PORT", "")
        if not 0 < port <= _MAX_PORT:
            raise ConfigError(f"MASTER_PORT={port} is not a port (1 to {_MAX_PORT})")
        return cls(os.environ["MASTER_ADDR"], port)


def environment_rank() -> int:
    """Return this process's rank for its log and its messages; 0 if there is none."""
    try:
        return Launch.read().rank
    except ConfigError:
        return 0


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={shorten(text)} is not a number") from None
