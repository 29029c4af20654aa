"""The form of an input: rows in JSON, one a line, or prompts as plain text.

JSON in another form is refused as a whole: its lines would be sent to the model as prompts.
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
_ENOUGH = 1 << 20  # bytes to look for the end of the first value in


def holds_json(source: InputFile, separator: str, limit: int) -> bool:
    """Return True for rows in JSON: named so, or the first line looks like one.

    Args:
        source: the input.
        separator: of prompts: "line" or "blank-line".
        limit: the most bytes of a row.

    Raises:
        ConfigError: it is JSON, but not one row a line, or its lines end in CR alone.
    """
    with source.open() as file:
        first = _first_line(file, limit)
        line, is_named = first.decode(errors="replace").strip(), _is_named(source.path)
        if "\r" in line and not first.endswith(b"\n") and not file.read(1):
            raise source.error(
                f"its lines end in CR alone; write it with newlines (tr '\\r' '\\n' <{source.path})"
            )
        if not line.startswith(("[", "{")):
            return is_named
        value, end = _first_value(line, 0)
        if isinstance(value, dict) and end == len(line):
            return is_named or _is_row(value)
        rest = file.read(_ENOUGH).decode(errors="replace")
    if end < len(line):  # no value, or not only one
        is_other_form = _is_cut(line, rest, is_named or separator == "line")
    else:
        is_other_form = _is_row(value) or (is_named and not rest.strip())
    if is_other_form:
        raise _not_a_row_a_line(source, line)
    return is_named or (line.startswith("{") and ('"custom_id"' in line or '"body"' in line))


def looks_like_rows(text: str) -> bool:
    """Return True if the first line of a text is a row, or an array of rows begins there."""
    line = text.strip().split("\n")[0]
    value = _first_value(line, 0)[0]
    if value is None and line.startswith("["):
        value = _first_value(line, 1)[0]
    return _is_row(value)


def _first_line(file: BinaryIO, limit: int) -> bytes:
    """Return the first line that is not blank, or as much of it as a row may have."""
    while line := file.readline(limit):
        if line.strip():
            return line
    return b""


def _is_named(path: Path) -> bool:
    return path.suffix.lower() in JSON_NAMES


def _is_row(value: Any) -> bool:
    """Return True for an object with a field of a row, or a list that begins with one."""
    if isinstance(value, list):
        value = value[0] if value else None
    return isinstance(value, dict) and not _ROW_FIELDS.isdisjoint(value)


def _is_cut(line: str, rest: str, is_json: bool) -> bool:
    """Return True if a line is the beginning of JSON that goes on in the lines after it.

    Args:
        line: which is no JSON by itself, and begins as an array or an object does.
        rest: what follows.
        is_json: the input cannot be anything else, rows of prompts over several lines least of all.
    """
    text = f"{line}\n{rest}"
    value, end = _first_value(text, 0)
    if value is not None:
        return end > len(line) and (is_json or _is_row(value))
    if line.startswith("["):  # an array that is damaged, or longer than was read
        value = _first_value(text, 1)[0]
        if _is_row(value) or (is_json and isinstance(value, dict) and line.endswith((",", "["))):
            return True
    return line in _OPENINGS and ('"custom_id"' in text or '"body"' in text)


def _first_value(text: str, begin: int) -> tuple[Any, int]:
    """Return the value that begins there, after blanks, and its end; None for none."""
    begin = len(text) - len(text[begin:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None, 0


def _not_a_row_a_line(source: InputFile, line: str) -> ConfigError:
    form, convert = "objects over several lines", "jq -c ."
    if line.startswith("["):
        form, convert = "an array", "jq -c '.[]'"
    name = "" if source.path == STANDARD else f" {source.path}"
    return source.error(
        f"JSON with {form}; a batch has one row a line (`{convert}{name}` writes it so)"
    )
