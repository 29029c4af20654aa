"""Output of a chat if only input or output is a terminal."""

import os
import pty
import tty

import pytest

from dsv3.serve.terminal import Lines


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_commands_no_terminal_and_is_unchanged_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    if is_terminal:
        tty.setraw(theirs)
    with open(theirs, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        Lines().answer("a\x1b[2J\tb\x9b胡\n")
        shown = os.read(ours, 1000).decode()
        monkeypatch.undo()
    os.close(ours)
    assert shown == ("a[2J\tb胡\n" if is_terminal else "a\x1b[2J\tb\x9b胡\n")


def test_a_note_commands_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    Lines().note("model\x1b]0;x\x07 of\nseveral lines")
    assert capfd.readouterr().err == "(model\\x1b]0;x\\x07 of\nseveral lines)\n"
