"""The commands of a chat."""

from typing import cast

import pytest

from dsv3.engine.engine import Engine
from dsv3.request import RequestOutput
from dsv3.serve.chat import Chat
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from tests.scripted_chat import INTERRUPT, THINKS, TOKENIZER, ListConsole, ScriptedEngine, talk


def test_a_format_without_thoughts_is_mentioned() -> None:
    _, console = talk([], thinking=True)
    reason = "this model's chat format has no switch for it"
    assert f"asking for thinking changes nothing: {reason}" in console.shown


def test_clear_begins_a_new_conversation() -> None:
    engine, _ = talk(["I am Anna.", "/clear", "Who am I?"], [["Noted."], ["Who?"]])
    assert "Anna" not in engine.prompts[1]
    assert [r.conversation_id for r in engine.requests] == ["chat-1", "chat-2"]
    assert engine.dropped == ["chat-1"]


def test_the_system_message_can_be_changed() -> None:
    lines = ["/system", "a", "/system Be\nkind.", "b", "/clear", "c", "/system -", "d"]
    engine, console = talk(lines, [["1"], ["2"], ["3"], ["4"]], system="Be brief.")
    systems = ["Be brief.", "Be\nkind.", "Be\nkind.", ""]
    begin = "<｜begin▁of▁sentence｜>"
    for prompt, system in zip(engine.prompts, systems, strict=True):
        assert prompt.startswith(f"{begin}{system}<｜User｜>")
    assert console.shown[1:] == [
        "system message: Be brief.",
        "system message: Be\nkind.",
        "a new conversation",
        "no system message",
    ]


def test_regenerate_answers_again_with_other_random_numbers() -> None:
    answers = [["Noted."], ["You?"], ["Anna."], ["Anna!"], ["Fine."]]
    lines = ["/regenerate", "I am Anna.", "Who am I?", "/regenerate", "/regenerate", "Good."]
    engine, console = talk(lines, answers, flags=Sampling(temperature=1.0))
    assert console.shown[1] == "there is no message to answer again"
    second, third, fourth = engine.requests[1:4]
    assert second.prompt_ids == third.prompt_ids == fourth.prompt_ids
    assert [second.answer, third.answer, fourth.answer] == [0, 1, 2]
    assert second.params == third.params
    assert "Anna!" in engine.prompts[4]
    assert "You?" not in engine.prompts[4]


def test_regenerate_at_temperature_zero_says_that_nothing_changes() -> None:
    _, console = talk(["Hi.", "/regenerate"], [["Yes."], ["Yes."]])
    assert console.shown[1] == "the temperature is 0: the answer will be the same"
    _, console = talk(["Hi.", "/set temperature 1", "/regenerate"], [["Yes."], ["No."]])
    assert console.shown[1:] == ["temperature: 1"]


def test_regenerate_answers_a_question_whose_answer_was_stopped() -> None:
    lines = ["I am Anna.", "Who am I?", "/regenerate", "/regenerate", "Sure?"]
    answers = [["Noted."], [INTERRUPT], ["Anna."], [INTERRUPT], ["Yes."]]
    engine, console = talk(lines, answers)
    assert engine.prompts[1] == engine.prompts[2] == engine.prompts[3]
    assert "Anna.<｜end" in engine.prompts[4]
    assert [text for text in console.shown if text.startswith("stopped")] == [
        "stopped; the question is forgotten, since it has no answer",
        "stopped; the previous answer is kept",
    ]


def test_undo_forgets_turns_one_by_one() -> None:
    lines = ["I am Anna.", "Who am I?", "/undo", "Hi.", "/undo", "/undo", "/undo", "Hello."]
    engine, console = talk(lines, [["Noted."], ["Anna."], ["Hi."], ["Hello."]])
    assert "Who am I?" not in engine.prompts[2]
    assert "Noted." in engine.prompts[2]
    assert engine.prompts[3] == "<｜begin▁of▁sentence｜><｜User｜>Hello.<｜Assistant｜>"
    forgotten = ["forgotten: Who am I?", "forgotten: Hi.", "forgotten: I am Anna."]
    assert console.shown[1:] == [*forgotten, "there is nothing to undo"]


def test_values_are_set_by_the_rules_of_rows() -> None:
    lines = [
        "/set temperature 0.7",
        "/set top_k=3.0",
        "/set --top-k -1",
        "/set max-tokens 9",
        "/set stop END",
        "/set thinking on",
        "Hi.",
        "/set stop -",
        "/set temperature -",
        '/set stop ["a", "b"]',
        "/set min_p",
    ]
    engine, console = talk(lines, [["Yes."]], THINKS)
    params = engine.requests[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 0, 9)
    assert params.stop == ("END",)
    assert engine.prompts[0].endswith("<think>")
    assert console.shown[1:] == [
        "temperature: 0.7",
        "top_k: 3",
        "top_k: 0",
        "max_tokens: 9",
        'stop: ["END"]',
        "thinking: true",
        "stop: none",
        "temperature: 0.0",
        'stop: ["a", "b"]',
        "min_p: 0.0",
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("temperatur 1", "temperatur is not a setting of a chat; did you mean temperature?"),
        ("temp 1", "temp is not a setting of a chat; did you mean temperature?"),
        ("max_new_tokens 1", "max_new_tokens is not a setting of a chat; did you mean max_tokens?"),
        ("xyz 1", "xyz is not a setting of a chat; /set shows all values"),
        ("temperature hot", 'temperature="hot" must be a number'),
        ("temperature NaN", "temperature=nan must be between 0 and 100"),
        ("temperature 101", "temperature=101 must be between 0 and 100"),
        ("temperature null", "temperature needs a value; - is the one at the start of the chat"),
        ("max_tokens 5.5", "max_tokens=5.5 must be a whole number from 0 to 2147483647"),
        ("top_p 0", "top_p=0 must be above 0 and at most 1"),
        ("stop ['a']", None),
        (
            'stop ["a", 5]',
            'stop=["a", 5] must be a text of 1 to 1024 characters',
        ),
        (
            'stop ""',
            'stop="" must be a text of 1 to 1024 characters',
        ),
        ("seed " + "9" * 20, f"seed={'9' * 20} must be a whole number from -92"),
        ("thinking perhaps", 'thinking="perhaps" must be true or false'),
    ],
)
def test_a_wrong_value_is_one_line(text: str, error: str | None) -> None:
    _, console = talk([f"/set {text}"])
    if error is None:
        assert console.shown[1].startswith("stop: ")
    else:
        assert console.shown[1].startswith(f"not set: {error}")
    assert len(console.shown) == 2


def test_set_shows_all_values() -> None:
    _, console = talk(["/set"], flags=Sampling(temperature=0.5), seed=7)
    shown = dict(line.split(maxsplit=1) for line in console.shown[1].splitlines())
    assert shown["temperature"] == "0.5"
    assert shown["max_tokens"] == "all there is room for"
    assert (shown["seed"], shown["stop"], shown["thinking"]) == ("7", "none", "false")


def test_a_seed_that_is_set_gives_the_same_answers_again() -> None:
    lines = ["/set seed 5", "Hi.", "And?", "/set seed 5", "Ho.", "/undo", "/set seed 6", "Hm."]
    engine, _ = talk(lines, [["Yes."]] * 4)
    assert [text in engine.prompts[3] for text in ("Hi.", "And?", "Ho.")] == [True, True, False]
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[0] == seeds[2]
    assert len(set(seeds)) == 3


def test_a_stop_text_does_not_come_back_as_tokens() -> None:
    class Stopping(ScriptedEngine):
        def step(self) -> list[RequestOutput]:
            outputs = super().step()
            assert outputs[-1].completion is not None
            outputs[-1].completion.token_ids += TOKENIZER.encode("END", False)
            return outputs

    engine = Stopping([["Noted."], ["Yes."]])
    lines = ["/set stop END", "I am Anna.", "Really?"]
    console = ListConsole(engine, lines)
    Chat(cast(Engine, engine), ChatFormat(TOKENIZER), Defaults(), console).run("demo")
    assert "END" not in engine.prompts[1]


def test_help_lists_commands_and_keys() -> None:
    _, console = talk(["/help", "/regenrate"])
    assert all(name in console.shown[1] for name in ("/undo", "/regenerate", "/set NAME VALUE"))
    assert console.shown[1].endswith("how to type")
    wrong = "/regenrate is not a command (did you mean /regenerate?); /help lists them"
    assert console.shown[2] == wrong
    _, console = talk(["/temperature 0.5"])
    assert console.shown[1].startswith(
        "/temperature is not a command (did you mean /set temperature?)"
    )


def test_unknown_commands_are_not_sent_unless_they_look_like_text() -> None:
    lines = ["/foo bar", "/usr/bin is what?", " /clear", "/exit", "never"]
    engine, console = talk(lines, [["A folder."], ["Nothing."]])
    assert console.shown[1:] == ["/foo is not a command; /help lists them"]
    assert [p.count("/clear") for p in engine.prompts] == [0, 1]


def test_stats_count_prompts_and_answers() -> None:
    _, console = talk(["/stats", "I am Anna.", "Who am I?", "/stats"], [["Noted."], ["Anna."]])
    assert console.shown[1] == "no answers yet"
    lines = console.shown[2].splitlines()
    assert "3 computed" in lines[0]
    assert "first token after" in lines[1] and "tok/s" in lines[1]
    assert lines[2].startswith("all 2") and "6 computed" in lines[2]
    assert lines[3].startswith("context ") and lines[3].endswith(" of 1,000 tokens")
    assert lines[4] == "cache          1,024 of 4,096 tokens"


def test_stats_after_undo_are_those_of_the_turns_that_are_left() -> None:
    _, console = talk(["I am Anna.", "/stats", "Who?", "/undo", "/stats"], [["Noted."], ["You."]])
    before, after = (text.splitlines()[3] for text in console.shown if "context  " in text)
    assert before == after


def test_thinking_that_cannot_be_switched_is_mentioned_when_it_is_set() -> None:
    _, console = talk(["/set thinking on"])
    reason = "this model's chat format has no switch for it"
    assert console.shown[1:] == [
        "thinking: true",
        f"asking for thinking changes nothing: {reason}",
    ]
    always = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}<think>"
    _, console = talk(["/set thinking off"], template=always)
    assert console.shown[2].startswith("thinking cannot be switched off: ")
