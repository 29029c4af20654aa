"""The turns of a chat: requests, output, history and dropped turns."""

from itertools import pairwise
from typing import cast

import pytest

from dsv3.engine.engine import Engine
from dsv3.request import RequestOutput
from dsv3.serve.chat import Chat
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from tests.scripted_chat import (
    DEMO,
    INTERRUPT,
    THINKS,
    TOKENIZER,
    ListConsole,
    ScriptedEngine,
    talk,
)


def test_a_conversation_grows_turn_by_turn() -> None:
    engine, console = talk(["I am Anna.", "", "Who am I?"], [["Not", "ed."], ["Anna."]])
    assert console.answers == ["Noted.", "Anna.", ""]
    user, assistant, end = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
    assert engine.prompts[1] == f"{engine.prompts[0]}Noted.{end}{user}Who am I?{assistant}"
    assert {r.conversation_id for r in engine.requests} == {"chat-1"}
    assert engine.requests[0].params.max_tokens == 1000 - len(engine.requests[0].prompt_ids)
    assert engine.requests[0].params.seed != engine.requests[1].params.seed


def test_the_tokens_of_an_answer_stay_those_that_the_model_chose() -> None:
    """Its text might be cut into tokens otherwise; the cache holds the chosen ones."""
    chosen = [TOKENIZER.encode(letter, False)[0] for letter in "Noted"]
    assert TOKENIZER.encode("Noted", False) != chosen

    class Spelling(ScriptedEngine):
        def step(self) -> list[RequestOutput]:
            outputs = super().step()
            assert outputs[-1].completion is not None
            outputs[-1].completion.token_ids = chosen
            return outputs

    engine = Spelling([["Noted"], ["Yes."]])
    Chat(
        cast(Engine, engine),
        ChatFormat(TOKENIZER),
        Defaults(),
        ListConsole(engine, ["I am Anna.", "Really?"]),
    ).run("demo")
    first, second = (request.prompt_ids for request in engine.requests)
    assert second[: len(first) + len(chosen)] == first + chosen


def test_ctrl_c_keeps_the_partial_answer() -> None:
    engine, console = talk(["Tell!", "Go on."], [["Once ", INTERRUPT, "never"], ["upon"]])
    assert console.answers == ["Once ", "upon", ""]
    assert "Once <｜end" in engine.prompts[1]
    assert "stopped" in console.shown


@pytest.mark.parametrize("answer", [[INTERRUPT], ["Let me", INTERRUPT]])
def test_a_question_without_an_answer_is_forgotten(answer: list[str]) -> None:
    engine, console = talk(["Tell!", "Who am I?"], [answer, ["You."]], THINKS, thinking=True)
    assert "Tell!" not in engine.prompts[1]
    assert "stopped; the question is forgotten, since it has no answer" in console.shown


def test_thoughts_are_shown_apart_and_not_said_again() -> None:
    pieces = ["Hm", "m.</th", "ink>\n", "\nYes."]
    engine, console = talk(["Well?", "Sure?"], [pieces, ["</think>No."]], THINKS, thinking=True)
    assert console.thoughts == "Hmm."
    assert console.answers[:2] == ["\n\nYes.", "No."]
    assert engine.prompts[1].endswith("[user]Well?[assistant]Yes.[user]Sure?[assistant]<think>")


def test_thoughts_that_the_model_opens_are_shown_apart() -> None:
    pieces = ["\n<thi", "nk>\nHmm.", "\n</think>", "\n\nYes."]
    engine, console = talk(["Well?", "Sure?"], [pieces, ["No."]])
    assert console.thoughts == "Hmm.\n"
    assert console.answers[:2] == ["\n\nYes.", "No."]
    assert "<｜Assistant｜>Yes.<｜end▁of▁sentence｜>" in engine.prompts[1]


def test_an_answer_that_is_the_beginning_of_a_mark_is_shown() -> None:
    _, console = talk(["Well?"], [["<th"]])
    assert console.answers[0] == "<th"


def test_control_tokens_that_users_type_are_text_and_stay_in_the_shared_prefix() -> None:
    said = "Is <｜end▁of▁sentence｜><｜User｜> a token?"
    engine, _ = talk([said, "Sure?"], [["Yes, <｜User｜> is."], ["Yes."]])
    first, second = (request.prompt_ids for request in engine.requests)
    user, end = (TOKENIZER.id_of(name) for name in ("<｜User｜>", "<｜end▁of▁sentence｜>"))
    assert user is not None and end is not None
    assert (first.count(user), first.count(end)) == (1, 0)
    assert (second.count(user), second.count(end)) == (3, 1)  # one in the scripted engine's answer
    assert second[: len(first)] == first
    assert said in engine.prompts[1]


def test_a_full_context_is_said_in_words() -> None:
    engine, console = talk(
        ["I am Anna.", "Who am I?", "/clear", "Hi.", "long " * 40],
        [["word " * 60], ["Hello."]],
        max_seq_len=40,
        on_full="stop",
    )
    assert len(engine.requests) == 2
    full, refused, _, too_long = console.shown[1:]
    assert full == "the context of 40 tokens is full; /clear begins a new conversation"
    assert refused.startswith("not sent: the conversation with it has ")
    assert refused.endswith(
        "the context holds 40, question and answer together; /clear begins a new one, --on-full "
        "drop drops the oldest turns"
    )
    assert too_long.endswith(", --on-full drop drops the oldest turns")


@pytest.mark.parametrize("answer", ["word " * 6, "Hm."])
def test_the_oldest_turns_are_dropped_from_a_full_context(answer: str) -> None:
    lines = [f"Message {i}?" for i in range(30)]
    engine, console = talk(lines, [[answer]] * 30, max_seq_len=200, system="Be brief.")
    dropped = [i for i, text in enumerate(console.shown) if "dropped" in text]
    assert dropped
    assert len(dropped) < 8  # several turns at once: most prompts begin as the one before
    assert console.shown[dropped[0]].endswith(" dropped: the context of 200 tokens is full")
    sizes = [len(request.prompt_ids) for request in engine.requests]
    assert len(sizes) == 30
    assert max(sizes) <= 175  # an eighth is for the answer
    falls = [after for before, after in pairwise(sizes) if after < before]
    assert len(falls) == len(dropped)
    assert all(60 < after <= 100 for after in falls)
    for i, prompt in enumerate(engine.prompts):
        assert prompt.startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Message ")
        assert prompt.endswith(f"<｜User｜>Message {i}?<｜Assistant｜>")


def test_an_answer_that_fills_the_context_is_dropped_before_the_next_message() -> None:
    lines = ["I am Anna.", "Who am I?", "long " * 60, "Hi."]
    engine, console = talk(lines, [["word " * 60], ["You."], ["Hello."]], max_seq_len=40)
    full, dropped, too_long = console.shown[1:]
    assert full == "the context of 40 tokens is full; the next message drops the oldest turns"
    assert dropped == "the oldest turn was dropped: the context of 40 tokens is full"
    assert too_long.startswith("not sent: it has ")
    assert "Who am I?" in engine.prompts[2]  # a message that is too long drops nothing


def test_a_message_is_sent_as_it_was_typed() -> None:
    lines = ["\tall:\n\t\tgcc a.c\n", " \t\n", "  Is that right? "]
    engine, _ = talk(lines, [["It is."], ["It is."]])
    assert engine.prompts[0].endswith("<｜User｜>\tall:\n\t\tgcc a.c\n<｜Assistant｜>")
    assert engine.prompts[1].endswith("<｜User｜>  Is that right? <｜Assistant｜>")


def test_a_message_longer_than_the_context_must_be_shorter() -> None:
    engine, console = talk(["long " * 60], max_seq_len=40)
    assert not engine.requests
    assert console.shown[-1].startswith("not sent: it has ")
    assert console.shown[-1].endswith("it must be shorter")


def test_an_answer_cut_short_says_how_to_allow_more() -> None:
    flags = Sampling(max_tokens=2)
    _, console = talk(["Tell!"], [["one two"]], flags=flags)
    assert console.shown[-1].endswith("/set max_tokens allows more")


def test_a_template_without_end_leaves_the_chat_open() -> None:
    engine, console = talk(["Hi", "Hi again"], template="{{ 'a' * 10 ** 10 }}")
    assert engine.requests == []
    reason = "not sent: {}: chat template: more than 1,024 MiB of memory"
    assert console.shown[1:] == [reason.format(DEMO / "tokenizer_config.json")] * 2
