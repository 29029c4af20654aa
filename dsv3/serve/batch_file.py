"""Batch files: rows of requests in, lines of results out, in the format of OpenAI's Batch API.

Input is read row by row on demand. A row that cannot be parsed is still a row: it carries an error,
and has a line in the output like any other.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from dsv3.errors import ConfigError, RequestError
from dsv3.read_files import parse_json_text
from dsv3.serve.input_file import InputFile
from dsv3.serve.row_form import holds_json
from dsv3.text.defaults import LINE_DEFAULTS, Defaults
from dsv3.text.openai_fields import Fields, show
from dsv3.text.openai_format import parse_request, plain_request
from dsv3.text.text_request import TextRequest, digest

SEPARATORS = ("line", "blank-line")
# Ten times the text of the longest context; tokenizing a text takes 150 times its memory.
MAX_ROW_BYTES = 16 << 20

# Error codes of rows without an id.
NO_ID = "no_custom_id"
REPEATED_ID = "repeated_custom_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the input: a request, or an error.

    Attributes:
        number: line of the file where the row begins, from 1.
        custom_id: the row's id; `line-NUMBER` if it has none.
        digest: digest of the content, to detect from the output that a row has changed.
        error, code: the error in one line, and its code.
    """

    number: int
    custom_id: str
    digest: str
    request: TextRequest | None = None
    error: str | None = None
    code: str | None = None

    @property
    def key(self) -> "RowKey":
        """The row's unique key in the file."""
        return row_key(self.custom_id, self.digest, self.code)


RowKey = str | tuple[str, str]


def row_key(custom_id: str, digest: str, code: str | None) -> RowKey:
    """Return the unique key of a row: its id, with its digest if the id is missing or repeated."""
    return (custom_id, digest) if code in (NO_ID, REPEATED_ID) else custom_id


@dataclass(frozen=True)
class BatchInput:
    """An input file, a pipe or standard input (`-`); each iteration reads its rows again.

    The format is JSONL according to the file's suffix or if the first line looks like a row.
    Otherwise a row is a prompt of one line (separator "line"), or of several lines up to a blank
    one ("blank-line"). Blank lines are skipped.

    Raises:
        ConfigError: the input cannot be read, is not text, or is JSON in another format.
    """

    path: Path
    defaults: Defaults
    separator: str = "line"
    flag: str = "--input-file"

    def __post_init__(self) -> None:
        """Raise ConfigError at once for an input that cannot be read."""
        if self.separator not in SEPARATORS:
            raise ConfigError(
                f"--prompt-separator={self.separator} is unknown; use {' or '.join(SEPARATORS)}"
            )
        self.is_jsonl  # noqa: B018 (opens the file and checks its format)

    @cached_property
    def source(self) -> InputFile:
        """The opened input."""
        return InputFile.find(self.path, self.flag)

    @cached_property
    def is_jsonl(self) -> bool:
        """True if the rows are JSON."""
        return holds_json(self.source, self.separator, MAX_ROW_BYTES)

    def __iter__(self) -> Iterator[Row]:
        numbers: dict[str, int] = {}  # of the rows seen, by id
        for number, raw in self._records():
            yield _read_row(number, raw, self.is_jsonl, self.defaults, numbers)

    def count(self) -> int:
        """Return the number of rows, without parsing them."""
        return sum(1 for _ in self._records())

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Yield the line number and the bytes of each row."""
        with self.source.open() as file:
            by_blank = groupby(_lines(file), key=lambda entry: not entry[1].strip())
            for group in (group for is_blank, group in by_blank if not is_blank):
                if self.is_jsonl or self.separator == "line":
                    yield from group
                else:
                    yield _join(group)


def result_line(row: Row, status: int, body: dict[str, Any]) -> bytes:
    """Return the output line of a row."""
    response = {"status_code": status, "request_id": row.digest, "body": body}
    line = {
        "id": f"batch_req_{row.digest}",
        "custom_id": row.custom_id,
        "response": response,
        "error": None,
    }
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which needs escapes
        return json.dumps(line, allow_nan=False).encode()


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; a line beyond `MAX_ROW_BYTES` is cut one byte after the limit."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        yield number, line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)


def _join(lines: Iterable[tuple[int, bytes]]) -> tuple[int, bytes]:
    """Return the first line number and the joined lines, cut after they exceed a row's limit."""
    first = 0
    parts: list[bytes] = []
    size = 0
    for number, line in lines:
        first = first or number
        if size <= MAX_ROW_BYTES:
            parts.append(line)
            size += len(line)
    return first, b"".join(parts)


def _read_row(
    number: int, raw: bytes, is_json: bool, defaults: Defaults, numbers: dict[str, int]
) -> Row:
    """Parse a row; if that fails, return a row with the error."""
    custom_id = f"line-{number}"
    code = NO_ID
    try:
        text = _decode(raw)
        value = _row_object(text) if is_json else {}
        custom_id = _custom_id(value) if is_json else custom_id
        if custom_id in numbers:
            code = REPEATED_ID
            raise RequestError(
                f"custom_id={show(custom_id)} was used before, in row {numbers[custom_id]}"
            )
        numbers[custom_id] = number
        code = "invalid_request"
        if is_json:
            request = _parse(value, custom_id, defaults)
        else:
            if not text.strip("\0 \t\r\n"):  # left by a file system after a crash
                raise RequestError("nothing but NUL characters")
            messages = [{"role": "user", "content": text.rstrip("\r\n")}]
            request = plain_request(messages, custom_id, defaults, LINE_DEFAULTS)
        return Row(number=number, custom_id=custom_id, request=request, digest=request.digest())
    except RequestError as reason:
        error = str(reason)
    except RecursionError:
        error = "nested too deeply"
    except MemoryError:
        error = "there is not enough memory for it"
    # Repeated rows may have the same text; rows with an id may move within the file.
    content = raw.strip() if code not in (NO_ID, REPEATED_ID) else b"%d:%b" % (number, raw.strip())
    return Row(number=number, custom_id=custom_id, digest=digest(content), error=error, code=code)


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_ROW_BYTES:
        raise RequestError(f"longer than {MAX_ROW_BYTES >> 20} MiB")
    try:
        # Concatenated files contain byte order marks in the middle.
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; convert the file "
            "first (iconv -f WINDOWS-1252 -t UTF-8, say)"
        ) from None


def _row_object(text: str) -> dict[str, Any]:
    """Parse a row strictly: no NaN, no repeated fields, no excessive numbers."""
    try:
        value = parse_json_text(text)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if not isinstance(value, dict):
        raise RequestError("not a JSON object")
    return value


def _custom_id(value: dict[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if custom_id is None:
        raise RequestError("custom_id is missing")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"custom_id={show(custom_id)} must be a text, and not empty")
    return custom_id


def _parse(value: dict[str, Any], custom_id: str, defaults: Defaults) -> TextRequest:
    fields = Fields(value)
    fields.text("custom_id")
    fields.take("method", lambda method: method == "POST", '"POST"')
    url = fields.text("url")
    body = fields.take("body", lambda v: isinstance(v, dict), "an object")
    if url is None:
        raise RequestError("url is missing")
    if body is None:
        raise RequestError("body is missing")
    for name in fields.remaining():
        raise RequestError(f"{name} is not a field of a row, only custom_id, method, url and body")
    return parse_request(url, body, custom_id, defaults)
