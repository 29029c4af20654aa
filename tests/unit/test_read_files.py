"""Every way in which a file can be damaged is one line that names it."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.errors import CheckpointError, ConfigError
from dsv3.read_files import YAML_BYTES, read_bytes, read_json, read_mapping, read_text, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)
DAMAGED = {
    "absent.json": (None, "No such file or directory"),
    "empty.json": (b"", "not JSON: Expecting value (character 1)"),
    "cut.json": (
        b'{"a": 1,\n',
        "not JSON: Expecting property name enclosed in double quotes (line",
    ),
    "array.json": (b"[]", "not a mapping of field names to values"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "deep object.json": (b'{"a":' * 100_000, "nested too deeply"),
    "digits.json": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit (4300 digits)"),
    "nan.json": (b'{"a": NaN}', "not JSON: NaN is not a number"),
    "infinity.json": (b'{"a": -Infinity}', "not JSON: -Infinity is not a number"),
    "large.json": (b'{"a": 1e400}', "not JSON: 1e400 is beyond the range of a float"),
    "twice.json": (b'{"a": 1, "b": 0, "a": 2}', "a is given twice, with different values"),
    "latin.json": (b'{"a": "\xe9"}', "byte 8 (0xe9) is not UTF-8"),
    "utf16.json": ('{"a": 1}'.encode("utf-16"), "byte 1 (0xff) is not UTF-8"),
    "tag.yaml": (b"a: !!python/object/apply:os.getcwd []", "not YAML: could not determine a"),
    "cut.yaml": (b"a: [1, 2", "not YAML: expected ',' or ']', but got"),
    "control.yaml": (b"a: \x07", "unacceptable character #x0007"),
    "deep.yaml": (b"[" * 50_000, "nested too deeply"),
    "laughs.yaml": (LAUGHS.encode(), "its aliases stand for more than 100000 values"),
    "merges.yaml": (MERGES.encode(), "its aliases stand for more than 100000 values"),
    "cycle.yaml": (b"a: &a [*a]", "its aliases stand for more than 100000 values"),
    "digits.yaml": (b"a: " + b"9" * 5000, "Exceeds the limit (4300 digits)"),
    "long.yaml": (b"a: 1\n" * (YAML_BYTES // 5 + 1), "larger than the 262,144 bytes"),
    "pointer.json": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7847602\n",
        "a Git LFS pointer, not the file itself; run git lfs pull",
    ),
    "list.yaml": (b"- a", "not a mapping of field names to values"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    data, reason = DAMAGED[name]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_mapping(path, CheckpointError)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert reason in line
    assert "\n" not in line and len(line) < len(str(path)) + 200


def _socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(path))  # the address has room for a hundred letters
    server.close()


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not a regular file but a named pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file but a device"),
    "directory": (Path.mkdir, "cannot be read: Is a directory"),
    "socket": (_socket, "not a regular file but a socket"),
    "link to nothing": (
        lambda path: path.symlink_to("nothing"),
        "cannot be read: No such file or directory",
    ),
    "link to itself": (
        lambda path: path.symlink_to(path),
        "cannot be read: Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_only_regular_files_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = OTHERS[kind]
    make(tmp_path / "x.json")
    with pytest.raises(ConfigError) as caught:
        read_json(tmp_path / "x.json")
    assert str(caught.value) == f"{tmp_path / 'x.json'}: {reason}"


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for name, reason in (("a" * 5000, "File name too long"), ("a\0b", "embedded null byte")):
        with pytest.raises(ConfigError, match=reason):
            read_text(tmp_path / name)


def test_links_and_byte_order_marks_are_fine(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b'\xef\xbb\xbf{"a": 1, "b": [1e3], "a": 1}')
    (tmp_path / "x.json").symlink_to("blob")
    assert read_mapping(tmp_path / "x.json") == {"a": 1, "b": [1000.0]}
    assert read_text(tmp_path / "x.json")[0] == "{"


def test_machine_written_files_have_every_key_once(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 1}}')
    assert read_json(tmp_path / "x.json") == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match="b is given twice"):
        read_json(tmp_path / "x.json", unique_keys=True)


def test_aliases_of_harmless_size_are_followed(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc:\n  <<: *a\n  d: *a\n")
    assert read_yaml(tmp_path / "x.yaml")["c"] == {"b": 1, "d": {"b": 1}}
    (tmp_path / "x.yaml").write_text("")
    assert read_yaml(tmp_path / "x.yaml") is None


def test_a_file_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, limit=100) == b"x" * 100
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ConfigError, match="larger than the 16,777,216 bytes that such a file may"):
        read_bytes(path)
