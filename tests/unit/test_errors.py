import traceback

import pytest

from dsv3.errors import (
    MAX_LINE,
    MAX_VALUE,
    CheckpointError,
    ConfigError,
    Dsv3Error,
    RankError,
    RequestError,
    describe_error,
    one_line,
    printable,
    shorten,
)

ESCAPED = {
    "clear screen": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "title": ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
    "C1 control sequence": ("\x9b31m", r"\x9b31m"),
    "delete": ("a\x7f", r"a\x7f"),
    "next line": ("a\x85b", r"a\x85b"),
    "line separator": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "right to left": ("a\u202egnp.exe", r"a\u202egnp.exe"),
    "isolates": ("\u2066a\u2069\u200f", r"\u2066a\u2069\u200f"),
    "half a surrogate pair": ("a\ud800", r"a\ud800"),
    "tab": ("a\tb", r"a\tb"),
    "carriage return": ("a\rb", "a b"),
    "lines": ("a \n\n  b\r\nc\n", "a b c"),
    "letters of all kinds": ("naïve 胡萝卜 🙂 שלום", "naïve 胡萝卜 🙂 שלום"),
}


@pytest.mark.parametrize("kind", ESCAPED)
def test_a_line_commands_no_terminal(kind: str) -> None:
    text, line = ESCAPED[kind]
    assert one_line(text) == line


@pytest.mark.parametrize("char", ["x", "\x1b", "\n"])
def test_a_line_has_a_bounded_length(char: str) -> None:
    line = one_line(f"/data/model.json: {char * 1_000_000}: not a number")
    assert len(line) <= MAX_LINE
    assert line.startswith("/data/model.json: ")
    assert line.endswith("not a number")


@pytest.mark.parametrize("kind", [CheckpointError, ConfigError, RequestError, RankError])
def test_an_error_of_ours_is_a_line_wherever_it_is_shown(kind: type[Dsv3Error]) -> None:
    error = kind("/data/\x1b[2J.json:\n" + "x" * 5000)
    assert str(error).startswith("/data/\\x1b[2J.json: xxx")
    assert len(str(error)) == MAX_LINE
    assert "\x1b" not in "".join(traceback.format_exception(error))


def test_text_of_several_lines_keeps_them() -> None:
    assert printable("a\n\tb\x1b[2J\r\u202e") == "a\n\tb\\x1b[2J\\r\\u202e"


def test_values_are_cut_in_the_middle() -> None:
    assert shorten("short") == "short"
    assert shorten("a" * MAX_VALUE + "z") == "a" * 38 + "..." + "a" * 18 + "z"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("x.json:\nbad\x1b"), r"x.json: bad\x1b"),
        (RecursionError("too deep\nmore"), "RecursionError: too deep (debug logging shows more)"),
        (MemoryError(), "MemoryError (debug logging shows more)"),
        (FileNotFoundError(2, "No such file", "/a\x1b"), r"/a\x1b: No such file"),
        (OSError("odd"), "OSError: odd (debug logging shows more)"),
    ],
)
def test_any_error_is_one_line(error: Exception, line: str) -> None:
    assert describe_error(error) == line
