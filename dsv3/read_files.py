"""Read text, JSON and YAML files of users and model hubs.

Only regular files are opened, also through symbolic links, which hub caches use. The size is
limited by the kind of file, and any damage is reported in one line that names the file.
"""

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dsv3.errors import ConfigError, Dsv3Error, shorten

CONFIG_BYTES = 16 << 20  # of a configuration or a chat template
TABLE_BYTES = 512 << 20  # of a file that grows with the model: vocabulary, index, manifest
# PyYAML reads about 100 kB per second, and nested aliases in a few hundred bytes can expand to any
# number of values.
YAML_BYTES = 256 << 10
YAML_VALUES = 100_000

# First bytes of the files that Git LFS uses as placeholders for large files.
_LFS_POINTER = b"version https://git-lfs."

Kind = type[Dsv3Error]

_NAMES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path, kind: Kind = ConfigError, fault: str = "") -> int:
    """Open a regular file to read; return its descriptor.

    Args:
        path: the file, or a link to it.
        kind: type of errors.
        fault: prefix of the system's reason in errors (default: the path).

    Raises:
        kind: the file cannot be opened, is a pipe, a device, a directory or a socket, or is a
            placeholder of Git LFS.
    """
    with _damage_as(fault or str(path), kind):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            name = _NAMES.get(stat.S_IFMT(mode), "something else")
            raise kind(f"{path}: not a regular file but {name}")
        # Non-blocking, since the file may have been replaced by a pipe meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
            os.close(descriptor)
            raise kind(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull")
        return descriptor


def read_bytes(path: Path, kind: Kind = ConfigError, limit: int = CONFIG_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes."""
    fault = f"{path}: cannot be read"
    descriptor = open_regular(path, kind, fault)
    with _damage_as(fault, kind), open(descriptor, "rb") as file:
        data = b"" if os.fstat(descriptor).st_size > limit else file.read(limit + 1)
        if len(data) > limit or os.fstat(descriptor).st_size > limit:
            raise kind(f"{path}: larger than the {limit:,} bytes that such a file may have")
        return data


def read_text(path: Path, kind: Kind = ConfigError, limit: int = CONFIG_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte order mark."""
    data = read_bytes(path, kind, limit)
    with _damage_as(f"{path}: cannot be read", kind):
        return data.decode("utf-8-sig")


def read_json(
    path: Path, kind: Kind = ConfigError, limit: int = CONFIG_BYTES, unique_keys: bool = False
) -> Any:
    """Return the value of a JSON file; `unique_keys` as in `parse_json`."""
    data = read_bytes(path, kind, limit)
    return parse_json(data, f"{path}: cannot be read", kind, unique_keys)


def read_mapping(path: Path, kind: Kind = ConfigError) -> dict[str, Any]:
    """Return the fields of a YAML file according to its suffix, otherwise of a JSON file."""
    data = read_yaml(path, kind) if path.suffix in (".yaml", ".yml") else read_json(path, kind)
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise kind(f"{path}: not a mapping of field names to values")
    return data


def read_yaml(path: Path, kind: Kind = ConfigError) -> Any:
    """Return the value of a YAML file: plain data with at most `YAML_VALUES` values."""
    text = read_text(path, kind, YAML_BYTES)
    with _damage_as(f"{path}: cannot be read", kind):
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            _check_size(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()


def parse_json(data: bytes, fault: str, kind: Kind = ConfigError, unique_keys: bool = False) -> Any:
    """Return the value of UTF-8 JSON text; `fault` is the prefix of errors.

    NaN and numbers beyond the range of a float are errors. A repeated key in an object must have
    the same value both times; with `unique_keys`, it is an error.
    """
    with _damage_as(fault, kind):
        return parse_json_text(data.decode("utf-8-sig"), unique_keys)


def parse_json_text(text: str, unique_keys: bool = True) -> Any:
    """Return the value of JSON text, with the rules of `parse_json`.

    Raises:
        ValueError: the text is not JSON; the message is one line.
        RecursionError: the text is nested too deeply.
    """
    try:
        return json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_unique if unique_keys else _consistent,
        )
    except _RepeatedKeyError:
        raise
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        if error.lineno == 1:
            place = f"character {error.pos + 1}"
        raise ValueError(f"not JSON: {error.msg} ({place})") from None
    except ValueError as error:  # an integer of thousands of digits; omit the advice to programmers
        raise ValueError(f"not JSON: {str(error).split(' for integer')[0]}") from None


class _RepeatedKeyError(ValueError):
    """An object has a repeated key."""


@contextmanager
def _damage_as(fault: str, kind: Kind) -> Iterator[None]:
    """Convert all errors that a damaged file can cause into an error of one line."""
    try:
        yield
    except Dsv3Error:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except RecursionError:
        reason = "nested too deeply"
    except MemoryError:
        reason = "there is not enough memory for it"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = f"not YAML: {error.problem or error.context}{place}"
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = str(error).split("\n")[0]
    else:
        return
    raise kind(f"{fault}: {reason}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{shorten(text)} is beyond the range of a float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name in fields if counts[name] > 1)
        raise _RepeatedKeyError(f"{shorten(repeated)} is given twice")
    return fields


def _consistent(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if fields[name] != value:
                raise _RepeatedKeyError(f"{shorten(name)} is given twice, with different values")
    return fields


def _check_size(root: yaml.Node | None) -> None:
    """Raise ValueError if a document has too many values with its aliases expanded."""
    pending = [root]
    count = 0
    while pending:
        node = pending.pop()
        count += 1
        if count + len(pending) > YAML_VALUES:
            raise ValueError(f"its aliases stand for more than {YAML_VALUES} values")
        if isinstance(node, yaml.MappingNode):
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
