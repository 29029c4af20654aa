"""The line editor: keys in, a line and its picture out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.serve.line_editor import Keys, LineEditor, width


def typed(keys: str, history: list[str] | None = None) -> LineEditor:
    editor = LineEditor(history or [])
    for key in Keys().push(keys):
        editor.press(key)
    return editor


LEFT, RIGHT, UP, DOWN, HOME, DELETE = "\x1b[D", "\x1b[C", "\x1b[A", "\x1b[B", "\x1b[H", "\x1b[3~"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("abc", "abc"),
        (f"ac{LEFT}b", "abc"),
        (f"bc{HOME}a", "abc"),
        ("bc\x01a\x05d", "abcd"),
        ("abx\x7fc", "abc"),
        (f"axb{LEFT}{LEFT}{DELETE}", "ab"),
        (f"ab{RIGHT}{LEFT}{LEFT}{LEFT}\x04", "b"),
        ("one two  \x17three", "one three"),
        ("one two\x1bb\x0b", "one "),
        ("one two\x1b[1;5D\x15", "two"),
        (f"one two{HOME}\x1bf!", "one! two"),
        ("e\u0301x\x7f\x7f", ""),
        (f"日本{LEFT}\x7f", "本"),
        ("a\x1b\nb", "a\nb"),
        ("\x1b[200~a\r\nb\rc\x1b[31m\x1b[201~d", "a\nb\nc[31md"),
        ("a\x1b[99;5~\x1b[15~\x1bzb", "ab"),
        ("\x1a\x0f", ""),
    ],
)
def test_keys_edit_the_line(keys: str, text: str) -> None:
    assert typed(keys).text == text


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (UP, "second"),
        (UP + UP, "first"),
        (UP + UP + UP, "first"),
        (f"new{UP}{DOWN}", "new"),
        (f"{UP}!{DOWN}{UP}", "second"),
        (DOWN, ""),
        ("\x10\x10\x0e", "second"),
    ],
)
def test_the_history_is_walked(keys: str, text: str) -> None:
    history = ["first", "second"]
    editor = typed(keys, history)
    assert editor.text == text and editor.cursor == len(text)
    assert history == ["first", "second"]


@pytest.mark.parametrize("cut", range(1, 17))
def test_keys_may_come_in_parts(cut: int) -> None:
    sent = "a\x1b[1;5D\x1b[200~é\x1b[201~b"
    keys = Keys()
    found = [*keys.push(sent[:cut]), *keys.push(sent[cut:])]
    assert found == ["a", "word left", "paste:é", "b"]
    assert not keys.unfinished


def test_escape_alone_is_given_up_but_a_paste_is_not() -> None:
    keys = Keys()
    assert not [*keys.push("\x1b")] and keys.unfinished
    keys.drop()
    assert [*keys.push("[A")] == ["[", "A"]
    assert not [*keys.push("\x1b[200~text")]
    keys.drop()
    assert [*keys.push("\x1b[201~")] == ["paste:text"]


def test_rows_wrap_where_the_screen_does() -> None:
    assert typed("abcdef").rows("> ", 5) == (["> abc", "def"], 1, 3)
    assert typed("abc").rows("> ", 5) == (["> abc", ""], 1, 0)
    assert typed("ab日本").rows("> ", 5) == (["> ab", "日本"], 1, 4)
    assert typed("a\x1b\nb").rows("> ", 5) == (["> a", "  b"], 1, 3)
    assert typed(f"abc{HOME}").rows("> ", 5) == (["> abc"], 0, 2)
    assert typed(f"abcdef{LEFT}{LEFT}{LEFT}").rows("> ", 5) == (["> abc", "def"], 1, 0)


@given(
    st.text(st.sampled_from("ab 日é\u0301\n"), max_size=40),
    st.integers(0, 40),
    st.integers(4, 12),
)
def test_rows_show_all_of_the_line_and_the_cursor_within(text: str, at: int, columns: int) -> None:
    editor = LineEditor([])
    editor.text, editor.cursor = text, min(at, len(text))
    rows, row, column = editor.rows(">>", columns)
    assert "".join(rows).replace(" ", "") == ">>" + text.replace("\n", "").replace(" ", "")
    assert all(sum(map(width, shown)) <= columns for shown in rows)
    assert 0 <= row < len(rows) and 0 <= column < columns


@given(st.lists(st.sampled_from(["a", "日", " ", LEFT, RIGHT, UP, "\x7f", "\x17", "\x0b", DELETE])))
def test_no_keys_break_the_editor(keys: list[str]) -> None:
    editor = typed("".join(keys), ["before"])
    assert 0 <= editor.cursor <= len(editor.text)
