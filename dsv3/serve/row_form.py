"""The format of an input: JSON rows, one per line, or prompts as plain text.

JSON in another format is refused, since its lines would be sent to the model as prompts.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

from dsv3.errors import ConfigError
from dsv3.serve.input_file import InputFile
from dsv3.streams import STANDARD

JSON_NAMES = (".jsonl", ".ndjson", ".json")
_ROW_FIELDS = {"custom_id", "body", "url", "messages", "prompt"}
_OPENINGS = ("[", "{", "[{")
_SEARCHED = 1 << 20  # bytes after the first line to search for the end of its value


def holds_json(source: InputFile, separator: str, limit: int) -> bool:
    """Return True for JSON rows, according to the file's suffix or the first line.

    Args:
        source: the input.
        separator: separator of prompts: "line" or "blank-line".
        limit: most bytes of a row.

    Raises:
        ConfigError: the input is JSON without one row per line, or its lines end in CR alone.
    """
    with source.open() as file:
        first = _first_line(file, limit)
        line = first.decode(errors="replace").strip()
        is_named = _is_named(source.path)
        if "\r" in line and not first.endswith(b"\n") and not file.read(1):
            raise source.error(
                f"its lines end in CR alone; write it with newlines (tr '\\r' '\\n' <{source.path})"
            )
        if not line.startswith(("[", "{")):
            return is_named
        value, end = _first_value(line, 0)
        if isinstance(value, dict) and end == len(line):
            return is_named or _is_row(value)
        following = file.read(_SEARCHED).decode(errors="replace")
    if end < len(line):  # the line is not exactly one value
        is_other_format = _is_cut(line, following, is_named or separator == "line")
    else:
        is_other_format = _is_row(value) or (is_named and not following.strip())
    if is_other_format:
        raise _wrong_format(source, line)
    return is_named or (line.startswith("{") and ('"custom_id"' in line or '"body"' in line))


def looks_like_rows(text: str) -> bool:
    """Return True if the first line of a text is a row, or the beginning of an array of rows."""
    line = text.strip().split("\n")[0]
    value = _first_value(line, 0)[0]
    if value is None and line.startswith("["):
        value = _first_value(line, 1)[0]
    return _is_row(value)


def _first_line(file: BinaryIO, limit: int) -> bytes:
    """Return the first line that is not blank, cut at `limit` bytes."""
    while line := file.readline(limit):
        if line.strip():
            return line
    return b""


def _is_named(path: Path) -> bool:
    return path.suffix.lower() in JSON_NAMES


def _is_row(value: Any) -> bool:
    """Return True for an object with a field of rows, or a list that begins with such an object."""
    if isinstance(value, list):
        value = value[0] if value else None
    return isinstance(value, dict) and not _ROW_FIELDS.isdisjoint(value)


def _is_cut(line: str, following: str, is_json: bool) -> bool:
    """Return True if a line begins a JSON value that continues in the following lines.

    Args:
        line: a line that is not JSON by itself, and begins like an array or an object.
        following: the lines after it.
        is_json: True if the input cannot be prompts of several lines.
    """
    text = f"{line}\n{following}"
    value, end = _first_value(text, 0)
    if value is not None:
        return end > len(line) and (is_json or _is_row(value))
    if line.startswith("["):  # a damaged array, or one longer than the searched bytes
        value = _first_value(text, 1)[0]
        if _is_row(value) or (is_json and isinstance(value, dict) and line.endswith((",", "["))):
            return True
    return line in _OPENINGS and ('"custom_id"' in text or '"body"' in text)


def _first_value(text: str, begin: int) -> tuple[Any, int]:
    """Return the JSON value after `begin` and white space, and its end; None if there is none."""
    begin = len(text) - len(text[begin:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None, 0


def _wrong_format(source: InputFile, line: str) -> ConfigError:
    if line.startswith("["):
        contents = "an array"
        command = "jq -c '.[]'"
    else:
        contents = "objects over several lines"
        command = "jq -c ."
    name = "" if source.path == STANDARD else f" {source.path}"
    return source.error(
        f"JSON with {contents}; a batch has one row a line (`{command}{name}` writes it so)"
    )
