"""Grammars of answers with calls of strict tools: their texts, and what the tools are given."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from dsv3.engine.grammars import Grammars
from dsv3.errors import RequestError
from dsv3.request import Completion, Request, SamplingParams
from dsv3.text.answer_pieces import ParsedAnswer, parse_answer
from dsv3.text.call_marks import DEEPSEEK, DSML, KIMI
from dsv3.text.defaults import Defaults
from dsv3.text.grammar import answer_grammar
from dsv3.text.openai_format import CHAT, parse_request
from dsv3.text.text_request import TextRequest
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import CallForm
from tests.call_marks import marked_tokenizer

pytest.importorskip("llguidance", reason="schemas need llguidance: pip install llguidance")
VOCAB, EOS = 2048, 1
CALLS, END_CALLS, CALL, END_CALL, SEP = DEEPSEEK
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F", 3, None]},
        "days": {"anyOf": [{"$ref": "#/$defs/days"}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^[a-c]{2}$", "maxLength": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f.2", "strict": True, "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "h", "strict": True}},
]
FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
RIGHT = '{"city": "a</b>", "unit": "C", "days": [1, 2]}'
OTHER = '{"city": "", "unit": null, "code": "ab"}'
WRONG = ('{"city": "x"}', '{"unit": "C", "city": "x"}', '{"city": "x", "unit": "K"}', "[]", "{")


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CallForm], Tokenizer]:
    folder = tmp_path_factory.mktemp("marked")
    return cache(lambda form: marked_tokenizer(folder / form.name, form.marks))


def ask(**body: Any) -> TextRequest:
    hi = [{"role": "user", "content": "Hi"}]
    return parse_request(CHAT, {"messages": hi, "tools": TOOLS} | body, "row", Defaults())


def deepseek(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{END_CALL}"


def fenced(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END_CALL}"


def kimi(name: str, arguments: str) -> str:
    return f"{KIMI.call}functions.{name}:0{KIMI.sep}{arguments}{KIMI.end_call}"


def values(arguments: str) -> list[tuple[str, str, str]]:
    """The parameters of a call, the types and the texts of their values."""
    try:
        pairs = json.loads(arguments).items()
    except (ValueError, AttributeError):
        pairs = [("torn", 0)]
    return [
        (name, str(isinstance(v, str)).lower(), v if isinstance(v, str) else json.dumps(v))
        for name, v in pairs
    ]


def dsml(name: str, arguments: str) -> str:
    text = f'<{DSML}invoke name="{name}">\n'
    for parameter, is_text, value in values(arguments):
        head = f'<{DSML}parameter name="{parameter}" string="{is_text}">'
        text += f"{head}{value}</{DSML}parameter>\n"
    return f"{text}</{DSML}invoke>\n"


def glm(name: str, arguments: str) -> str:
    text = f"<tool_call>{name}"
    for parameter, _, value in values(arguments):
        text += f"<arg_key>{parameter}</arg_key><arg_value>{value}</arg_value>"
    return f"{text}</tool_call>"


# The form, and the texts of a call, between calls and around all calls.
FORMS: dict[str, tuple[CallForm, Callable[[str, str], str], str, str, str]] = {
    "v3.1": (CallForm.DEEPSEEK, deepseek, "", CALLS, END_CALLS),
    "v3": (CallForm.DEEPSEEK, fenced, "\n", CALLS, END_CALLS),
    "v3, open": (CallForm.DEEPSEEK, fenced, "\n", CALLS, ""),
    "v3.2": (
        CallForm.DSML,
        dsml,
        "",
        f"\n\n<{DSML}function_calls>\n",
        f"</{DSML}function_calls>",
    ),
    "kimi": (CallForm.KIMI, kimi, "", KIMI.calls, KIMI.end_calls),
    "glm": (CallForm.GLM, glm, "\n", "", ""),
}


def follows(tokenizer: Tokenizer, asked: TextRequest, text: str) -> bool:
    """Return True if the grammar of a request allows a text as the whole answer."""
    grammar = answer_grammar(asked.tools, asked.schema, tokenizer)
    assert grammar is not None
    request = Request(
        request_id="r", prompt_ids=[60], params=SamplingParams(), grammar=grammar, is_chat=True
    )
    constraint = grammars_of(tokenizer).constraint(request)
    assert constraint is not None
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS]
    return all(ids[i] in allowed(constraint.masks([60, *ids[:i]])[0]) for i in range(len(ids)))


@cache
def grammars_of(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, [EOS])


def allowed(mask: bytes) -> set[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def parsed(tokenizer: Tokenizer, asked: TextRequest, ids: list[int]) -> ParsedAnswer:
    text = tokenizer.decode(ids, skip_special_tokens=False)
    done = Completion(
        request_id="r", prompt_ids=[60], token_ids=ids, text=text, finish_reason="stop"
    )
    return parse_answer(asked, done, tokenizer)


@pytest.mark.parametrize("name", FORMS)
def test_arguments_of_strict_tools_follow_their_schemas(
    name: str, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    form, write, between, begin, end = FORMS[name]
    tokenizer = tokenizer_of(form)
    asked = ask()
    assert CallForm.of(tokenizer) is form

    def section(*calls: tuple[str, str]) -> str:
        return begin + between.join(write(*call) for call in calls) + end

    for calls in (
        [("f.2", RIGHT)],
        [("f.2", OTHER)],
        [("h", "{}")],
        [("g", '{"any": "thing", "x": [1]}'), ("f.2", RIGHT), ("h", "{}")],
    ):
        for before in ("", "I see. <b", "<think>Well</think>Yes:"):
            text = before + section(*calls)
            assert follows(tokenizer, asked, text), text
            found = parsed(tokenizer, asked, tokenizer.encode(text, add_special_tokens=False))
            got = [(call.name, json.loads(call.arguments)) for call in found.calls]
            assert got == [(called, json.loads(arguments)) for called, arguments in calls]
    for text in ("", "Only text, {[<", "<think>So</think>Text"):
        assert follows(tokenizer, asked, text)
    for wrong in WRONG:
        assert not follows(tokenizer, asked, section(("f.2", wrong))), wrong
    for wrong_call in (("x", "{}"), ("f.2", '{"city": "x", "unit": "C", "code": "abc"}')):
        assert not follows(tokenizer, asked, section(wrong_call))
    assert not follows(tokenizer, asked, section(("f.2", RIGHT)) + "More")


@pytest.mark.parametrize("name", FORMS)
def test_one_call_without_parallel_ones(
    name: str, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    form, write, between, begin, end = FORMS[name]
    tokenizer = tokenizer_of(form)
    one, two = write("f.2", RIGHT), between.join([write("f.2", RIGHT), write("h", "{}")])
    asked = ask(parallel_tool_calls=False)
    assert follows(tokenizer, asked, begin + one + end)
    assert not follows(tokenizer, asked, begin + two + end)
    assert follows(tokenizer, ask(), begin + two + end)


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_is_json_or_calls(
    name: str, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    form, write, _, begin, end = FORMS[name]
    tokenizer = tokenizer_of(form)
    asked = ask(response_format=FORM)
    calls = begin + write("g", '{"x": 1}') + end
    for text, is_right in (
        ('"yes"', True),
        (calls, True),
        ("<think>So</think>\n\n" + calls, True),
        ('<think>So</think>"no"', True),
        ("yes", False),
        ("Well" + calls, False),
        ('"yes"' + calls, False),
        ("", False),
    ):
        assert follows(tokenizer, asked, text) == is_right, text


@pytest.mark.parametrize("form", [form for form in CallForm if form is not CallForm.FORCED])
def test_all_calls_that_the_masks_allow_are_valid(
    form: CallForm, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(form)
    short = {"type": "string", "maxLength": 3}
    parameters = PARAMETERS | {"properties": PARAMETERS["properties"] | {"city": short}}
    function = {"name": "f.2", "strict": True, "parameters": parameters}
    asked = ask(tools=[{"type": "function", "function": function}])
    grammar = answer_grammar(asked.tools, None, tokenizer)
    begin = f"<{DSML}" if form is CallForm.DSML else form.marks[0]
    for seed in range(6):
        draw = np.random.default_rng(seed)
        request = Request(
            request_id="r", prompt_ids=[60], params=SamplingParams(), grammar=grammar, is_chat=True
        )
        constraint = grammars_of(tokenizer).constraint(request)
        assert constraint is not None
        ids = tokenizer.encode(begin, add_special_tokens=False)
        while EOS not in ids:
            choices = allowed(constraint.masks([60, *ids])[0])
            ids.append(EOS if EOS in choices else int(draw.choice(sorted(choices))))
            assert len(ids) < 2000
        answer = parsed(tokenizer, asked, ids[:-1])
        assert answer.finish_reason == "tool_calls" and not answer.content.strip()
        for call in answer.calls:
            found = json.loads(call.arguments)
            assert {"city", "unit"} <= set(found) <= set(PARAMETERS["properties"])
            assert len(found["city"]) <= 3 and found["unit"] in ("C", "F", 3, None)
            assert all(isinstance(day, int) for day in found.get("days") or ())
            assert found.get("code", "ab").strip("abc") == "" and len(found.get("code", "ab")) == 2


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"anyOf": []}, "parameters.anyOf"),
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "format"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "#/\\$defs/none"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "allows no value"),
        ({"properties": {"a": {"type": "string", "pattern": "(" * 10**6}}}, "pattern"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "pattern"),
        ({"properties": {"a": {"enum": []}}}, "allows no value"),
        ({"properties": {"a": False}}, "false"),
        ({"properties": {"a": {"type": "string", "minLength": "x"}}}, "a length"),
        ({"properties": {"a": {"minLength": 3, "maxLength": 2}}}, "minLength above maxLength"),
        ({"properties": {'a"': {}}}, "parameter name"),
        ({"properties": {" a": {}}}, "parameter name"),
        ({"properties": {"a": {"enum": ["x", "y"], "const": "x"}}}, "one of enum and const"),
        ({"properties": []}, "malformed properties"),
        ({"required": ["b"]}, "a required parameter"),
        ({"required": [{}]}, "a required parameter"),
    ],
)
def test_schemas_that_texts_cannot_follow_are_refused_by_name(
    schema: dict[str, Any], message: str, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    function = {"name": "f", "strict": True, "parameters": schema}
    asked = ask(tools=[{"type": "function", "function": function}])
    for form in (CallForm.DSML, CallForm.GLM):
        with pytest.raises(RequestError, match=f"strict=true of f.*{message}.*form of calls"):
            answer_grammar(asked.tools, None, tokenizer_of(form))


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("b+", "abbc", "ac"),
        ("^a/b", "a/bc", "xa/b"),
        (r"c\$$", "abc$", "c$d"),
        (r"^\d{2}\/x$", "12/x", "1/x"),
        (r"^\d$", "7", "７"),
        (r"^[\w/]+$", "a_/1", "é"),
        ("^(a|b)$", "b", "ab"),
        ("[|]", "a|b", "ab"),
    ],
)
def test_texts_match_patterns(
    pattern: str, right: str, wrong: str, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    parameters = {"properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    function = {"name": "f", "strict": True, "parameters": parameters}
    asked = ask(tools=[{"type": "function", "function": function}])
    for name in ("v3.2", "glm"):
        form, write, _, begin, end = FORMS[name]
        for value, is_right in ((right, True), (wrong, False)):
            text = begin + write("f", json.dumps({"a": value})) + end
            assert follows(tokenizer_of(form), asked, text) == is_right, text


@pytest.mark.parametrize(
    ("schema", "value", "is_right"),
    [
        ({"type": ["string", "null"]}, "2024-01-01", True),
        ({"type": ["string", "null"]}, "[5] and {", True),
        ({"type": ["string", "null"]}, "5", True),
        ({"type": ["string", "null"]}, " null", True),
        ({"type": ["string", "integer"]}, "5x", True),
        ({"type": ["string", "integer"]}, "05", True),
        ({"type": ["string", "integer"]}, "5.0", True),
        ({"type": ["string", "number"]}, '"5"', True),
        ({"enum": ["1", None]}, "1", True),
        ({"enum": ["1", 1], "type": "string"}, "1", True),
        ({"allOf": [{"type": "string"}]}, "5", True),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}, " 3", True),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}, "3", False),
        ({"anyOf": [{"type": "string"}, {"type": "number", "maximum": 5}]}, "1e5", False),
        ({"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 0}]}, "[1]", False),
        ({"anyOf": [{"type": "string"}, {"type": "boolean", "enum": [1]}]}, "true", True),
    ],
)
def test_texts_of_glm_are_free_unless_they_are_other_values(
    schema: dict[str, Any],
    value: str,
    is_right: bool,
    tokenizer_of: Callable[[CallForm], Tokenizer],
) -> None:
    tokenizer = tokenizer_of(CallForm.GLM)
    parameters = {"properties": {"a": schema}, "required": ["a"]}
    function = {"name": "f", "strict": True, "parameters": parameters}
    asked = ask(tools=[{"type": "function", "function": function}])
    text = glm("f", json.dumps({"a": value}))
    assert follows(tokenizer, asked, text) == is_right
    (call,) = parsed(tokenizer, asked, tokenizer.encode(text, add_special_tokens=False)).calls
    assert (json.loads(call.arguments) == {"a": value}) == is_right


@pytest.mark.parametrize("name", FORMS)
def test_lengths_are_refused_alike_in_every_form(
    name: str, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    for rule in ({"minLength": 1.0}, {"maxLength": 2.0}, {"minLength": -1}, {"minLength": True}):
        parameters = {"properties": {"a": {"type": "string"} | rule}}
        function = {"name": "f", "strict": True, "parameters": parameters}
        asked = ask(tools=[{"type": "function", "function": function}])
        with pytest.raises(RequestError, match="integer"):
            follows(tokenizer_of(FORMS[name][0]), asked, "")


def test_broken_patterns_are_refused(tokenizer_of: Callable[[CallForm], Tokenizer]) -> None:
    parameters = {"properties": {"a": {"type": "string", "pattern": "*a"}}}
    function = {"name": "f", "strict": True, "parameters": parameters}
    asked = ask(tools=[{"type": "function", "function": function}])
    with pytest.raises(RequestError, match="cannot be followed"):
        follows(tokenizer_of(CallForm.DSML), asked, "")


@pytest.mark.parametrize("name", FORMS)
def test_a_hundred_strict_tools(name: str, tokenizer_of: Callable[[CallForm], Tokenizer]) -> None:
    """As many as OpenAI takes, all with the same parameters."""
    form, write, _, begin, end = FORMS[name]
    functions = [{"name": f"f{i}", "strict": True, "parameters": PARAMETERS} for i in range(128)]
    asked = ask(tools=[{"type": "function", "function": function} for function in functions])
    assert follows(tokenizer_of(form), asked, begin + write("f127", RIGHT) + end)
    assert not follows(tokenizer_of(form), asked, begin + write("f128", RIGHT) + end)


@pytest.mark.parametrize("form", [CallForm.DSML, CallForm.GLM])
def test_schemas_with_many_paths_take_no_time(
    form: CallForm, tokenizer_of: Callable[[CallForm], Tokenizer]
) -> None:
    """Each of 60 schemas refers twice to the next one: 2^60 paths."""
    definitions: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)
    }
    definitions["d60"] = {"type": "string"}
    parameters = {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": definitions}
    function = {"name": "f", "strict": True, "parameters": parameters}
    asked = ask(tools=[{"type": "function", "function": function}])
    assert asked.tools is not None and asked.tools.types("f", "a") == {"string"}
    assert answer_grammar(asked.tools, None, tokenizer_of(form)) is not None


def test_tools_that_are_not_strict_leave_the_answer_free(
    tokenizer_of: Callable[[CallForm], Tokenizer],
) -> None:
    asked = ask(tools=TOOLS[1:2])
    assert answer_grammar(asked.tools, None, tokenizer_of(CallForm.DSML)) is None
