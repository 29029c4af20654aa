"""Conversion of library arguments to Python numbers, strings and lists.

Numbers and arrays of NumPy and torch are converted to Python's; a number may also be a string.
Each function raises ValueError for a value of a wrong type; its caller names the argument.
"""

import os
import re
from pathlib import Path
from typing import Any

_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")


def plain(value: Any) -> Any:
    """Return a NumPy or torch number or array as a Python number or list; others unchanged."""
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) and not isinstance(value, type) else value


def whole(value: Any) -> int:
    """Return a whole number, also for 10.0 and "10", but not for True."""
    value = plain(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value != value // 1:
        raise ValueError(value)
    return int(value)


def number(value: Any) -> float:
    """Return a number; an int stays an int, so that digests of requests do not change."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    return int(value) if isinstance(value, int) else float(value)


def truth(value: Any) -> bool:
    """Return a bool."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def text(value: Any) -> str:
    """Return a string, path or whole number as a string."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return value if isinstance(value, str) else str(whole(value))


def path(value: Any) -> Path:
    """Return a string or path as a path."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return Path(value)


def path_or_name(value: Any) -> Path | str:
    """Return a string unchanged, since it may name a repository; other paths as `Path`."""
    return value if isinstance(value, str) and value else path(value)


def texts(value: Any) -> tuple[str, ...]:
    """Return a string or a list of strings as a tuple."""
    value = plain(value)
    strings = (value,) if isinstance(value, str) else tuple(_items(value))
    if not all(isinstance(item, str) and item for item in strings):
        raise ValueError(value)
    return strings


def token_ids(value: Any) -> tuple[int, ...]:
    """Return a token id or a list of token ids as a tuple."""
    value = plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    ids = [plain(item) for item in _items(value)]
    if any(isinstance(token_id, str) for token_id in ids):
        raise ValueError(value)
    return tuple(map(whole, ids))


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple | set | frozenset | range):
        raise ValueError(value)
    return list(value)
