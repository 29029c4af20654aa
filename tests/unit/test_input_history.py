"""Messages kept between chats, whatever the file is like."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from dsv3.serve.input_history import InputHistory, history_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "dsv3" / "chat_history"


def test_messages_of_any_form_come_back(path: Path) -> None:
    messages = ["one", "several\n\tlines\r\n", "胡 👩‍👧 \x00\x1b\u2028", '"quoted" \\n']
    for message in messages:
        InputHistory(path).append(message)
    assert InputHistory(path).load() == messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_file_stays_small_and_keeps_the_newest(path: Path) -> None:
    history = InputHistory(path)
    history.append("x" * 100_000)  # too long to be kept
    assert history.load() == []
    for i in range(150):
        history.append(f"{i} " + "x" * 10_000)
    kept = history.load()
    assert kept[-1].startswith("149 ")
    assert 40 < len(kept) < 60
    assert path.stat().st_size <= 1 << 19
    history.append("last")
    assert InputHistory(path).load() == [*kept, "last"]


def test_chats_at_once_keep_each_others_messages(path: Path) -> None:
    def chat(name: int) -> None:
        history = InputHistory(path)
        for i in range(100):
            history.append(f"{name}.{i}")
            if i % 10 == 0:
                history.load()

    threads = [threading.Thread(target=chat, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = InputHistory(path).load()
    assert len(messages) == 400
    for name in range(4):
        assert [m for m in messages if m.startswith(f"{name}.")] == [
            f"{name}.{i}" for i in range(100)
        ]


def test_damaged_lines_are_left_out(path: Path) -> None:
    path.parent.mkdir(parents=True)
    lines = [json.dumps("first"), "[" * 100_000, "5", '"torn', "\udcff", '"last"', ""]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert InputHistory(path).load() == ["first", "last"]


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def make_pipe(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def make_null(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(os.devnull)


def make_file_of_folder(path: Path) -> None:
    path.parent.parent.mkdir(parents=True)
    path.parent.write_text("")


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_null, make_file_of_folder])
def test_a_file_that_cannot_be_used_is_as_an_empty_one(path: Path, make: object) -> None:
    assert callable(make)
    make(path)
    for _ in range(2):
        history = InputHistory(path)
        history.append("one")
        assert history.load() == []
    assert InputHistory(None).load() == []


def test_the_file_is_in_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert history_path() == Path("/home/anna/.local/state/dsv3/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    assert history_path() == Path("/home/anna/.local/state/dsv3/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/dsv3/chat_history")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "")
    assert history_path() is None
