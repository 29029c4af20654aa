"""Names of settings in messages: the argument in the library, the flag in the programs."""

from collections.abc import Callable

SettingName = Callable[[str], str]


def argument(name: str) -> str:
    """Return the name of a setting in Python."""
    return name


def flag(name: str) -> str:
    """Return the name of a setting on the command line."""
    return f"--{name.replace('_', '-')}"
