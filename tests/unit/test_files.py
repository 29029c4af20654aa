"""Writing files: recognized, replaced all at once, and never another's."""

import errno
import os
import re
from pathlib import Path

import pytest

from dsv3.errors import ConfigError, OutputError
from dsv3.files import Format, NamedFile, check_output, new_file, replacing, write_output

NOTES = Format("notes", re.compile(rb"notes"))


def output(path: Path) -> NamedFile:
    return NamedFile("--out", path)


@pytest.mark.parametrize("text", ["", "\n", "notes of before"])
def test_an_output_replaces_its_own_kind(tmp_path: Path, text: str) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(path)
    if text:
        path.write_text(text)
        path.chmod(0o640)
    check_output(output(link), NOTES)
    assert path.exists() == bool(text)
    write_output(output(link), NOTES, "notes of now")
    write_output(output(link), NOTES, b"notes of later")
    assert link.is_symlink() and path.read_text() == "notes of later"
    assert not text or path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_an_output_leaves_other_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("a diary")
    with pytest.raises(ConfigError, match=f"^--out={path}: another file is there, not notes; cho"):
        check_output(output(path), NOTES)
    with pytest.raises(OutputError, match="cannot be written: another file is there"):
        write_output(output(path), NOTES, "notes")
    assert path.read_text() == "a diary"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none/out", "there is no such directory"),
        ("file/out", "there is no such directory"),
        (".", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=reason):
        check_output(output(tmp_path / name), NOTES)
    with pytest.raises(OutputError, match=f"cannot be written: {reason}"):
        write_output(output(tmp_path / name), NOTES, "notes")


def test_devices_and_pipes(tmp_path: Path) -> None:
    for _ in range(2):
        check_output(output(Path("/dev/null")), NOTES)
        write_output(output(Path("/dev/null")), NOTES, "notes")
    os.mkfifo(tmp_path / "pipe")
    check_output(output(tmp_path / "pipe"), NOTES)
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(output(tmp_path / "pipe"), NOTES, "notes")
    assert os.read(reader, 10) == b"notes"
    os.close(reader)


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_cannot_be_replaced_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is mounted there alone, say: it is written where it is."""
    path = tmp_path / "out"
    path.write_text("notes")

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "replace", busy)
    write_output(output(path), NOTES, "notes of now")
    assert path.read_text() == "notes of now"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(OutputError, match="busy"):
        write_output(output(tmp_path / "new"), NOTES, "notes")


def test_a_new_file_is_new(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    for name in ("target", "link"):
        path = tmp_path / name
        if name == "link":
            path.symlink_to(tmp_path / "target")
        with pytest.raises(FileExistsError), new_file(path):
            pass
    assert (tmp_path / "target").read_text() == "mine"


def test_a_pipe_that_nothing_reads_is_an_error_and_no_wait(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    kind = Format("anything", re.compile(b""))
    with pytest.raises(OutputError, match=r"--stats-file=.*pipe: cannot be written"):
        write_output(NamedFile("--stats-file", pipe), kind, "{}")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(NamedFile("--stats-file", pipe), kind, "{}")
    assert os.read(reader, 10) == b"{}"
    os.close(reader)
