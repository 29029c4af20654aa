from pathlib import Path

import pytest

from dsv3.text.detokenize import TextStream
from dsv3.text.thoughts import (
    END_THINK,
    THINK,
    SplitAnswer,
    ThoughtStream,
    begins_in_thought,
    split_answer,
)
from dsv3.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
SPECIAL = Tokenizer.load(DEMO)  # its think marks are special tokens


def plain_marks(folder: Path) -> Tokenizer:
    """The same vocabulary with think marks that are not special, as DeepSeek's own."""
    text = (DEMO / "tokenizer.json").read_text()
    for mark in (THINK, END_THINK):
        at = text.index('"special"', text.index(f'"content": "{mark}"'))
        text = text[:at] + text[at:].replace('"special": true', '"special": false', 1)
    (folder / "tokenizer.json").write_text(text)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module", params=["special", "plain"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "special":
        return SPECIAL
    made = plain_marks(tmp_path_factory.mktemp("plain"))
    assert made.decode(made.encode(THINK, False)) == THINK
    return made


# Text of an answer, whether the prompt opened a thought, the thought, the answer.
SPLITS = [
    ("hm\n</think>\n\nYes.", True, "hm", "Yes."),
    ("still thinking", True, "still thinking", ""),
    ("</think>Yes.", True, "", "Yes."),
    ("<think>\nhm</think>Yes.", True, "hm", "Yes."),  # opened once more by the model
    ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
    ("\n <think>hm</think> Yes. </think>", False, "hm", " Yes. </think>"),
    ("<think></think>Yes.", False, "", "Yes."),
    ("<think>never ends", False, "never ends", ""),
    ("<thi", False, None, "<thi"),
    ("  \n", False, None, "  \n"),
    ("  Yes. <think>no</think>", False, None, "  Yes. <think>no</think>"),
    ("Greet.</think>Hello", False, None, "Greet.</think>Hello"),
    ("", False, None, ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), SPLITS)
def test_answers_are_split(text: str, inside: bool, reasoning: str | None, content: str) -> None:
    assert split_answer(text, inside) == SplitAnswer(reasoning, content)


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), SPLITS)
def test_streams_are_split_wherever_the_text_is_cut(
    text: str, inside: bool, reasoning: str | None, content: str
) -> None:
    for cut in range(len(text) + 1):
        stream = ThoughtStream(inside)
        parts = (text[:cut], text[cut : cut + 3], text[cut + 3 :])
        pieces = [*map(stream.push, parts), stream.finish()]
        assert "".join(piece.before_answer + piece.answer for piece in pieces) == text
        thought = "".join(piece.thought for piece in pieces).strip()
        assert (thought if stream.has_thought else None) == reasoning
        assert "".join(piece.answer for piece in pieces) == content
        texts = [text for piece in pieces for text in piece.texts()]
        assert "".join(text for text in texts if not text.is_thought) == content


def answer(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), prompt: str = "Hi", **kind: bool
) -> tuple[str, bool]:
    stream = TextStream(tokenizer, tokenizer.encode(prompt, False), stop, **kind)
    for token_id in tokenizer.encode(text, False):
        if stream.push(token_id)[1]:
            return stream.text, True
    stream.finish()
    return stream.text, False


@pytest.mark.parametrize("opened", [True, False])
def test_marks_of_a_thought_are_kept_as_text(tokenizer: Tokenizer, opened: bool) -> None:
    prompt, mark = ("Hi" + THINK + "\n", "") if opened else ("Hi", THINK)
    text, _ = answer(tokenizer, f"{mark}Two and two.{END_THINK}4", (), prompt, is_chat=True)
    assert text == f"{mark}Two and two.{END_THINK}4"


def test_special_marks_elsewhere_are_left_out_as_from_any_text() -> None:
    assert answer(SPECIAL, f"4{THINK}5{END_THINK}", is_chat=True) == ("45", False)
    assert answer(SPECIAL, f"{THINK}4{END_THINK}5") == ("45", False)


@pytest.mark.parametrize("opened", [True, False])
def test_stop_strings_end_the_answer_not_the_thought(tokenizer: Tokenizer, opened: bool) -> None:
    prompt, mark = ("Hi" + THINK, "") if opened else ("Hi", "\n" + THINK)
    said = f"{mark}one stop two{END_THINK}\n\nthree stop four"
    until = f"{mark}one stop two{END_THINK}\n\nthree "
    assert answer(tokenizer, said, ("stop", "\n\n"), prompt, is_chat=True) == (until, True)
    assert answer(tokenizer, f"{mark}one stop", ("stop",), prompt, is_chat=True)[1] is False


def test_a_stop_string_in_held_text_ends_the_answer_at_its_end() -> None:
    stream = TextStream(SPECIAL, SPECIAL.encode("Hi", False), ("<t",), is_chat=True)
    for token_id in SPECIAL.encode("<thi", False):
        stream.push(token_id)
    stream.finish()
    assert stream.text == ""


def test_raw_prompts_know_no_thoughts(tokenizer: Tokenizer) -> None:
    text, stopped = answer(tokenizer, "one stop two", ("stop",), "Hi" + THINK)
    assert (text, stopped) == ("one ", True)


def test_a_thought_is_opened_by_the_token_not_by_a_text_like_it(tokenizer: Tokenizer) -> None:
    for blanks in ("", "\n", " \n\n"):
        assert begins_in_thought(tokenizer, tokenizer.encode("Hi" + THINK + blanks, False))
    assert not begins_in_thought(tokenizer, tokenizer.encode(f"Hi{THINK}{END_THINK}", False))
    assert not begins_in_thought(tokenizer, tokenizer.encode_ordinary("Hi" + THINK))
    assert not begins_in_thought(None, [1, 2])


def test_where_no_token_opens_a_thought_its_text_does(tmp_path: Path) -> None:
    text = (DEMO / "tokenizer.json").read_text().replace('"<think>"', '"<other>"')
    (tmp_path / "tokenizer.json").write_text(text)
    unmarked = Tokenizer.load(tmp_path)
    assert unmarked.id_of(THINK) is None
    assert begins_in_thought(unmarked, unmarked.encode("Hi <think>\n", False))
    assert not begins_in_thought(unmarked, unmarked.encode("Hi", False))
