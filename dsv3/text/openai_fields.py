"""The fields of a JSON object, taken out one by one with type checks."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from dsv3.errors import RequestError, shorten


class Fields:
    """The fields of an object, taken out one by one with type checks; null counts as absent."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._remaining = {name: value for name, value in fields.items() if value is not None}

    def take(self, name: str, holds: Callable[[Any], bool], rule: str) -> Any:
        """Remove a field and return its value; None if it is absent."""
        value = self._remaining.pop(name, None)
        if value is not None and not holds(value):
            raise RequestError(f"{name}={show(value)} must be {rule}")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        """Take a whole number, such as 10 or 10.0 (some languages have only floats)."""
        rule = f"a whole number from {least} to {most}"
        value = self.take(name, lambda v: is_whole(v) and least <= v <= most, rule)
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """Take a number; its range is checked by `SamplingParams`."""
        return self.take(name, is_number, "a number")

    def truth(self, name: str) -> bool | None:
        """Take a truth value."""
        return self.take(name, lambda v: isinstance(v, bool), "true or false")

    def text(self, name: str) -> str | None:
        """Take a text."""
        return self.take(name, lambda v: isinstance(v, str), "a text")

    def refuse_rest(self, name: str) -> None:
        """Raise RequestError if a field was not taken; `name` is that of the object."""
        for field in self._remaining:
            raise RequestError(f"{name}.{shorten(field)} is not supported")

    def remaining(self) -> dict[str, Any]:
        """Return the fields that were not taken."""
        return self._remaining


def show(value: Any) -> str:
    """Return a value as JSON, shortened for a message."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return True for a number; truth values are not numbers."""
    return _is_integer(value) or isinstance(value, float)


def is_whole(value: Any) -> bool:
    """Return True for a whole number, such as 10 or 10.0."""
    return _is_integer(value) or (isinstance(value, float) and value.is_integer())
