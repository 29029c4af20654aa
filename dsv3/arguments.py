"""Values that a script passes, read as Python's own numbers, texts and lists.

Numbers and arrays of NumPy and torch are read as Python's, and a number may be written as text.
Every reader raises ValueError for a value of another kind; its caller names the argument.
"""

import os
import re
from pathlib import Path
from typing import Any

_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")


def plain(value: Any) -> Any:
    """Return a NumPy or torch number or array as Python's number or list; others as they are."""
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) and not isinstance(value, type) else value


def whole(value: Any) -> int:
    """Return a whole number; 10.0 and "10" are whole numbers, True is none."""
    value = plain(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value != value // 1:
        raise ValueError(value)
    return int(value)


def number(value: Any) -> float:
    """Return a number; an int stays one, so that digests of requests stay as they are."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    return int(value) if isinstance(value, int) else float(value)


def truth(value: Any) -> bool:
    """Return a truth value."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def text(value: Any) -> str:
    """Return a text, a path as text, or a whole number as text."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return value if isinstance(value, str) else str(whole(value))


def path(value: Any) -> Path:
    """Return a path, which may be a text."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return Path(value)


def path_or_name(value: Any) -> Path | str:
    """Return a text as it is, which may name a repository, or another kind of path as a path."""
    return value if isinstance(value, str) and value else path(value)


def texts(value: Any) -> tuple[str, ...]:
    """Return one text, or a list of texts, as a tuple."""
    value = plain(value)
    found = (value,) if isinstance(value, str) else tuple(_items(value))
    if not all(isinstance(each, str) and each for each in found):
        raise ValueError(value)
    return found


def token_ids(value: Any) -> tuple[int, ...]:
    """Return one token id, or a list of them, as a tuple."""
    value = plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    found = [plain(each) for each in _items(value)]
    if any(isinstance(each, str) for each in found):
        raise ValueError(value)
    return tuple(map(whole, found))


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple | set | frozenset | range):
        raise ValueError(value)
    return list(value)
