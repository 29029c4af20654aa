"""The output file of a batch job: other files, full disks, and files taken away meanwhile."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from dsv3.errors import ConfigError, OutputError
from dsv3.serve.batch_file import result_line
from dsv3.serve.journal import LINE_START, BatchJournal
from tests.batch_rows import GOOD, assert_every_row_once, batch, result, run


@pytest.mark.parametrize(
    "text", ["notes\n", "no line end", '{"a": 1}\n', "[1]\n", "\n", LINE_START.decode() + "\nx"]
)
def test_other_files_are_left_alone(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(ConfigError, match=r"line [12]: not a line of results; is this the right"):
        BatchJournal(out)
    assert out.read_text() == text


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 1000 bytes; only while needed, or pytest's own log is cut too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_harms_no_row_that_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = list(batch(tmp_path / "in.txt", ["one", "two"]))
    with full_disk(), BatchJournal(out) as journal:
        journal.resume(rows)
        journal.write(result(rows[0]))
        before = out.read_bytes()
        with pytest.raises(OutputError, match=r"cannot write \(File too large\); the rows written"):
            journal.write(result_line(rows[1], 200, {"text": "x" * 1000}))
    assert out.read_bytes() == before == result(rows[0]) + b"\n"


def test_a_disk_too_full_to_repair_changes_nothing_that_counts(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = list(batch(tmp_path / "in.txt", ["one", *(f"more {i}" for i in range(9))]))
    lines = [result(row) for row in rows[1:]]
    lines.insert(1, result(rows[0], 500))
    out.write_bytes(b"".join(line + b"\n" for line in lines))
    before = out.read_bytes()
    with full_disk(), BatchJournal(out) as journal:
        journal.resume(rows)
        with pytest.raises(OutputError, match="be repaired"):
            journal.begin()
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_two_jobs_cannot_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with BatchJournal(out), pytest.raises(ConfigError, match="another process is writing it"):
        BatchJournal(out)
    BatchJournal(out).close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none/out.jsonl", "there is no directory .*/none"), (".", "Is a directory")],
)
def test_output_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        BatchJournal(tmp_path / name)


def test_a_device_is_written_without_looking_back(tmp_path: Path) -> None:
    rows = batch(tmp_path / "in.jsonl", GOOD)
    assert len(run(Path("/dev/null"), rows)) == len(GOOD)


def test_links_and_permissions_survive_a_repair(tmp_path: Path) -> None:
    rows = batch(tmp_path / "in.jsonl", GOOD)
    out, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    first, second, _ = list(rows)
    out.write_bytes(result(first, 500) + b"\n" + result(second) + b"\n")
    out.chmod(0o640)
    run(link, rows)
    assert link.is_symlink()
    assert out.stat().st_mode & 0o777 == 0o640
    assert_every_row_once(out, rows)


def test_a_start_that_fails_changes_nothing(tmp_path: Path) -> None:
    """Until the first new line, the file is as an earlier run left it."""
    out, rows = tmp_path / "out.jsonl", batch(tmp_path / "in.jsonl", GOOD)
    first, second, third = list(rows)
    out.write_bytes(result(first) + b"\n" + result(second, 500) + b"\n" + result(third)[:9])
    before = out.read_bytes()
    emptied = []
    for overwrite in (False, True):
        with BatchJournal(
            out, overwrite, when_emptied=lambda: emptied.append(out.read_bytes())
        ) as j:
            j.resume(rows)
        assert out.read_bytes() == before
    assert not emptied
    with BatchJournal(
        out, overwrite=True, when_emptied=lambda: emptied.append(out.read_bytes())
    ) as j:
        j.resume(rows)
        j.write(result(second))
    assert emptied == [b""]
    assert out.read_bytes() == result(second) + b"\n"


def test_a_new_file_without_a_line_does_not_stay(tmp_path: Path) -> None:
    out, rows = tmp_path / "out.jsonl", batch(tmp_path / "in.jsonl", GOOD)
    with BatchJournal(out) as journal:
        journal.resume(rows)
    assert not out.exists()
    out.touch()
    BatchJournal(out).close()
    assert out.exists()
    out.unlink()
    with BatchJournal(out) as journal:
        journal.finish()
    assert out.exists()


@pytest.mark.parametrize("text", ["notes\n", '{"custom_id": "a"}\n', "\0\0data"])
def test_overwrite_empties_results_only(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(
        ConfigError, match="not a file of results, which --overwrite does not replace"
    ):
        BatchJournal(out, overwrite=True)
    assert out.read_text() == text


def remove(out: Path) -> None:
    out.unlink()


def rename(out: Path) -> None:
    out.rename(out.with_name("moved"))


def remove_folder(out: Path) -> None:
    out.parent.rename(out.parent.with_name("elsewhere"))


def replace(out: Path) -> None:
    out.with_name("other").write_text("other")
    out.with_name("other").replace(out)


def unlink_one_of_two(out: Path) -> None:
    os.link(out, out.with_name("hard"))
    out.unlink()


def cut(out: Path) -> None:
    os.truncate(out, 3)


def append(out: Path) -> None:
    with out.open("a") as file:
        file.write("more")


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (remove, "was removed or renamed while the job ran; its results are lost, start again"),
        (rename, "was removed or renamed .* its results are in .*/moved; move it back"),
        (remove_folder, "its results are in .*/elsewhere/out.jsonl; move it back"),
        (replace, "was removed or renamed .* its results are lost"),
        (unlink_one_of_two, "its results are in a hard link of that file; move it back"),
        (cut, r"was changed by another program .* \(it has 3 bytes, not \d+\); start again"),
        (append, "was changed by another program while the job ran"),
    ],
)
def test_a_file_that_is_taken_away_is_an_error(
    tmp_path: Path, event: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next line once in a while, and always at the end."""
    monkeypatch.setattr("dsv3.serve.journal.CHECK_SECONDS", 0)
    rows = list(batch(tmp_path / "in.jsonl", GOOD))
    for is_at_end in (False, True):
        folder = tmp_path / "results"
        folder.mkdir()
        with BatchJournal(folder / "out.jsonl") as journal:
            journal.write(result(rows[0]))
            event(folder / "out.jsonl")
            look = journal.finish if is_at_end else partial(journal.write, result(rows[1]))
            with pytest.raises(OutputError, match=reason):
                look()
        for left in (folder, tmp_path / "elsewhere"):
            shutil.rmtree(left, ignore_errors=True)


def test_a_file_replaced_before_the_first_line_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with BatchJournal(out, overwrite=True) as journal:
        replace(out)
        with pytest.raises(OutputError, match="was removed or renamed"):
            journal.write(b"x")
    assert out.read_text() == "other"


def test_a_repair_does_not_touch_neighbours_or_lose_the_lock(tmp_path: Path) -> None:
    out, rows = tmp_path / "out.jsonl", batch(tmp_path / "in.jsonl", GOOD)
    (tmp_path / "out.jsonl.part").write_text("of the user")
    first, second, third = list(rows)
    out.write_bytes(result(first, 500) + b"\n" + result(second) + b"\n")
    with BatchJournal(out) as journal:
        journal.resume(rows)
        journal.begin()
        with pytest.raises(ConfigError, match="another process is writing it"):
            BatchJournal(out)
        journal.write(result(third))
        journal.write(result(first))
    assert (tmp_path / "out.jsonl.part").read_text() == "of the user"
    assert_every_row_once(out, rows)


def test_a_pipe_gets_every_line_or_an_error(tmp_path: Path) -> None:
    rows, pipe = batch(tmp_path / "in.jsonl", GOOD), tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        written = run(pipe, rows)  # the pipe has room for all of it
        assert reader.read().splitlines() == written
    with BatchJournal(pipe) as journal, pytest.raises(OutputError, match="cannot write"):
        journal.write(b"never read")


def test_several_jobs_may_write_to_a_device() -> None:
    with (
        BatchJournal(Path("/dev/null")) as first,
        BatchJournal(Path("/dev/null"), overwrite=True) as second,
    ):
        for journal in (first, second):
            journal.write(b"x")
            journal.finish()
