"""Calls of tools in the text of an answer, whatever the pieces in which the text comes."""

import json
import random
from typing import Any

import pytest

from dsv3.text.call_marks import DEEPSEEK, DSML, KIMI
from dsv3.text.tool_calls import CallArguments, CallBegin, Text, ToolCallStream
from dsv3.text.tools import CallForm, ToolUse

CALLS, END_CALLS, CALL, END_CALL, SEP = DEEPSEEK
F, G = f'{CALL}f{SEP}{{"x": [1, "a}}"]}}{END_CALL}', f"{CALL}g{SEP}{{}}{END_CALL}"
V31 = f"Wait.\n\n{CALLS}{F}{G}{END_CALLS}"
FENCED = "{0}function{1}{2}\n```json\n{3}\n```{4}"
V3 = (
    "Wait."
    + CALLS
    + FENCED.format(CALL, SEP, "f", '{"x": [1, "a}"]}', END_CALL)
    + "\n"
    + FENCED.format(CALL, SEP, "g", "{}", END_CALL)
    + END_CALLS
)
V32 = (
    f'Wait.\n\n<{DSML}function_calls>\n<{DSML}invoke name="f">\n'
    f'<{DSML}parameter name="x" string="false">[1, "a}}"]</{DSML}parameter>\n</{DSML}invoke>\n'
    f'<{DSML}invoke name="g">\n</{DSML}invoke>\n</{DSML}function_calls>'
)
K2 = (
    f'Wait.{KIMI.calls}{KIMI.call}functions.f:0{KIMI.sep}{{"x": [1, "a}}"]}}{KIMI.end_call}'
    f"{KIMI.call}functions.g:1{KIMI.sep}{{}}{KIMI.end_call}{KIMI.end_calls}"
)
FORCED = '[{"name": "f", "arguments": {"x": [1, "a}"]}}, {"name": "g", "arguments": {}}]'
GLM = (
    'Wait.\n<tool_call>f<arg_key>x</arg_key><arg_value>[1, "a}"]</arg_value></tool_call>\n'
    "<tool_call>g</tool_call>"
)
FORMS = {
    "v3.1": (CallForm.DEEPSEEK, V31),
    "v3": (CallForm.DEEPSEEK, V3),
    "v3.2": (CallForm.DSML, V32),
    "kimi": (CallForm.KIMI, K2),
    "glm": (CallForm.GLM, GLM),
    "forced": (CallForm.FORCED, FORCED),
}
PARAMETERS = {
    "properties": {
        "text": {"anyOf": [{"$ref": "#/$defs/word"}, {"enum": ["5"]}]},
        "number": {"type": ["integer", "null"]},
        "either": {"type": ["string", "integer"]},
        "year": {"type": "string", "anyOf": [{"maxLength": 4}, {"format": "date"}]},
    },
    "$defs": {"word": {"type": "string"}},
}
TOOLS = ToolUse(
    tools=tuple({"function": {"name": name, "parameters": PARAMETERS}} for name in "fg")
)


def parse(form: CallForm, text: str, seed: int = 0) -> tuple[str, ToolCallStream]:
    """Return the text outside of calls; pieces are of random lengths, seed 0 is one piece."""
    draw = random.Random(seed)
    stream = ToolCallStream(form, TOOLS)
    events = []
    at = 0
    while at < len(text):
        size = draw.randint(1, 9) if seed else len(text)
        events += stream.push(text[at : at + size])
        at += size
    events += stream.finish()
    for call in stream.calls:  # a call begins before its arguments, which are its own
        own = [e for e in events if not isinstance(e, Text) and e.call is call]
        assert isinstance(own[0], CallBegin)
        assert "".join(e.text for e in own if isinstance(e, CallArguments)) == call.arguments
    return "".join(e.text for e in events if isinstance(e, Text)), stream


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_found_in_any_pieces(name: str) -> None:
    form, text = FORMS[name]
    for seed in range(30):
        rest, stream = parse(form, text, seed)
        assert rest == ("" if form is CallForm.FORCED else "Wait.")
        assert [(call.name, json.loads(call.arguments)) for call in stream.calls] == [
            ("f", {"x": [1, "a}"]}),
            ("g", {}),
        ]
        assert all(call.is_complete for call in stream.calls)


@pytest.mark.parametrize("name", FORMS)
def test_torn_calls_are_text_or_incomplete(name: str) -> None:
    form, text = FORMS[name]
    for stop in range(len(text)):
        rest, stream = parse(form, text[:stop], seed=stop)
        assert (rest, len(stream.calls)) == (parse(form, text[:stop])[0], len(stream.calls))
        if not stream.calls:
            assert rest == text[:stop]
        for call in stream.calls:
            assert call.is_complete or call is stream.calls[-1]
        if stream.calls and not stream.calls[-1].is_complete:
            assert (rest, stream.calls[-1].stop) == (text[: len(rest)], stop)
            assert rest in ("", "Wait."), "no part of the call"


@pytest.mark.parametrize(
    ("form", "call"),
    [
        (CallForm.DSML, f'<{DSML}invoke name="f">\n1</{DSML}invoke>'),
        (CallForm.DSML, f'<{DSML}invoke name="f"><{DSML}parameter x>1</{DSML}invoke>'),
        (CallForm.GLM, "<tool_call>f<arg_key>x</arg_key>1</tool_call>"),
    ],
)
def test_malformed_calls_are_incomplete(form: CallForm, call: str) -> None:
    begin = f"<{DSML}function_calls>" if form is CallForm.DSML else ""
    rest, stream = parse(form, f"Wait.{begin}{call}\n{call}Bye", 3)
    assert rest == "Wait.Bye"
    assert [(c.stop - c.start, c.is_complete) for c in stream.calls] == [(len(call), False)] * 2


@pytest.mark.parametrize("name", FORMS)
def test_calls_of_unknown_tools_are_text(name: str) -> None:
    form, text = FORMS[name]
    text = text.replace('"f"', '"h"').replace('"g"', '"h"').replace(".f:", ".h:")
    text = text.replace(".g:", ".h:").replace(f"f{SEP}", f"h{SEP}").replace(f"g{SEP}", f"h{SEP}")
    text = text.replace("f\n`", "h\n`").replace("g\n`", "h\n`")
    text = text.replace("call>f<", "call>h<").replace("call>g<", "call>h<")
    rest, stream = parse(form, text, 3)
    assert not stream.calls
    assert "".join(rest.split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("text", 'say "hi"\n <b>', 'say "hi"\n <b>'),
        ("text", "5", "5"),
        ("year", "2026", "2026"),
        ("number", "5", 5),
        ("number", "null", None),
        ("either", "5", 5),
        ("either", "2.5", "2.5"),
        ("either", "null", "null"),
        ("either", '"5"', '"5"'),
        ("number", '"5"', "5"),
        ("other", "NaN", "NaN"),
        ("either", "five", "five"),
        ("other", "[1]", [1]),
        ("other", "[1", "[1"),
        ("other", "", ""),
    ],
)
def test_values_of_glm_have_the_types_of_their_parameters(name: str, value: str, want: Any) -> None:
    text = f"<tool_call>f\n<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    for seed in range(10):
        _, stream = parse(CallForm.GLM, text, seed)
        assert json.loads(stream.calls[0].arguments) == {name: want}


def test_parameters_of_text_are_written_as_json() -> None:
    value = 'say "hi"\n\\ <b> </x>'
    text = (
        f'<{DSML}function_calls>\n<{DSML}invoke name="f">\n'
        f'<{DSML}parameter name="a" string="true">{value}</{DSML}parameter>\n'
        f'<{DSML}parameter name="b" string="false">null</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}function_calls>"
    )
    for seed in range(20):
        _, stream = parse(CallForm.DSML, text, seed)
        assert json.loads(stream.calls[0].arguments) == {"a": value, "b": None}


def test_arguments_that_are_no_object_are_incomplete() -> None:
    numbers = '{"a": NaN}', '{"a": [1e999]}'
    for arguments in ("[1]", "{1}", '{"a": 1', "nonsense", *numbers):
        _, stream = parse(CallForm.DEEPSEEK, f"{CALLS}{CALL}f{SEP}{arguments}{END_CALL}{END_CALLS}")
        assert [call.is_complete for call in stream.calls] == [False]


def test_a_forced_call_of_no_name_is_text() -> None:
    text = '[{"name": "\\x", "arguments": {}}]'
    assert parse(CallForm.FORCED, text)[0] == text


def test_marks_that_are_spelt_in_other_tokens_are_text() -> None:
    stream = ToolCallStream(CallForm.DEEPSEEK, TOOLS, mark_id=7)
    events = stream.push(V31, [1, 2, 3]) + stream.finish()
    assert "".join(event.text for event in events if isinstance(event, Text)) == V31
    marked = ToolCallStream(CallForm.DEEPSEEK, TOOLS, mark_id=7)
    marked.push(V31, [1, 7, 3])
    marked.finish()
    assert [call.name for call in marked.calls] == ["f", "g"]


def test_the_ids_of_kimi_are_kept() -> None:
    assert [call.call_id for call in parse(CallForm.KIMI, K2)[1].calls] == [
        "functions.f:0",
        "functions.g:1",
    ]
