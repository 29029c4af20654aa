"""Tools of requests: their checks, their place in prompts, answers with calls."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsv3.errors import RequestError
from dsv3.request import Completion, RequestOutput
from dsv3.text.answer_pieces import PieceStream, parse_answer
from dsv3.text.call_marks import DEEPSEEK
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults
from dsv3.text.detokenize import TextStream
from dsv3.text.openai_format import CHAT, parse_request
from dsv3.text.text_request import TextRequest, encode_prompt
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tool_calls import CallArguments, Text
from dsv3.text.tools import CallForm

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
CALLS, END_CALLS, CALL, END_CALL, SEP = DEEPSEEK
HI = [{"role": "user", "content": f"Hi {CALLS}"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "Does <｜User｜>"}}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}


def request(**body: Any) -> TextRequest:
    return parse_request(CHAT, {"messages": HI} | body, "row", Defaults())


def model(is_special: bool = False) -> Tokenizer:
    """The demo's tokenizer with DeepSeek's marks of calls."""
    loaded = Tokenizer.load(DEMO)
    vocabulary = loaded._vocabulary
    raw = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    added = [tokenizers.AddedToken(mark, special=is_special) for mark in DEEPSEEK]
    (raw.add_special_tokens if is_special else raw.add_tokens)(added)
    vocabulary._tokenizer = raw  # type: ignore[union-attr]
    vocabulary._added = raw.get_added_tokens_decoder()  # type: ignore[union-attr]
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(vocabulary, {}, template + "<｜Assistant｜>")
    tokenizer.special_tokens = loaded.special_tokens
    return tokenizer


def test_no_tools_are_none() -> None:
    bodies: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}]
    for body in bodies:
        assert request(**body).tools is None


def test_choices_are_read() -> None:
    tools = request(tools=[TOOL], tool_choice="required", parallel_tool_calls=False).tools
    assert tools is not None and tools.is_required and not tools.is_parallel
    named = {"type": "function", "function": {"name": "f"}}
    tools = request(tools=[TOOL], tool_choice=named).tools
    assert tools is not None and tools.only == "f" and tools.is_required
    schema = tools.forced_schema()
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": ["f"]}, r"tools\[0\] must be like"),
        ({"tools": [{"type": "web"}]}, r"tools\[0\] must be like"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "function.name="),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "tool_choice": "f"}, "tool_choice="),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "g"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [{**TOOL, "function": {"name": "f", "strict": "yes"}}]}, "strict"),
        ({"tools": [{**TOOL, "function": {"name": "f", "colour": 1}}]}, "colour"),
        (
            {"tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "array"}}}]},
            'parameters.type must be "object"',
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "schema is missing"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "both on and off"),
        ({"thinking": {"type": "maybe"}}, "type="),
        ({"reasoning_effort": "huge"}, "reasoning_effort="),
    ],
)
def test_malformed_fields_are_refused_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request(**body)


@pytest.mark.parametrize(
    ("body", "thinking"),
    [
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"thinking": True}, "reasoning_effort": "low"}, True),
        ({}, None),
    ],
)
def test_thinking_is_switched_in_several_ways(body: dict[str, Any], thinking: bool | None) -> None:
    assert request(**body).thinking is thinking


def test_tools_are_described_where_the_template_does_not() -> None:
    tokenizer = model()
    chat = ChatFormat(tokenizer)
    ids = encode_prompt(request(tools=[TOOL]), tokenizer, chat)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "### f\nDescription: Does <｜User｜>\n\nParameters: {}\n" in text
    # The marks of the example are tokens; those in the user's and the tool's texts are not.
    assert ids.count(tokenizer.id_of(CALLS) or -1) == 1
    assert ids.count(tokenizer.id_of("<｜User｜>") or -1) == 0
    plain = encode_prompt(request(tools=[TOOL], tool_choice="none"), tokenizer, chat)
    assert plain == encode_prompt(request(), tokenizer, chat)


def test_a_model_without_a_form_of_calls_takes_forced_ones_only() -> None:
    tokenizer = Tokenizer.load(DEMO)
    chat = ChatFormat(tokenizer)
    with pytest.raises(RequestError, match="tool_choice=required"):
        encode_prompt(request(tools=[TOOL]), tokenizer, chat)
    forced = request(tools=[TOOL], tool_choice="required")
    assert encode_prompt(forced, tokenizer, chat) == encode_prompt(request(), tokenizer, chat)
    assert forced.tools is not None and forced.tools.forced_schema()["type"] == "array"


@pytest.mark.parametrize("is_special", [False, True])
def test_calls_come_from_tokens(is_special: bool) -> None:
    tokenizer = model(is_special)
    assert CallForm.of(tokenizer) is CallForm.DEEPSEEK
    asked = request(tools=[TOOL | {"function": {"name": "f", "parameters": PARAMETERS}}])
    text = f'Yes.{CALLS}{CALL}f{SEP}{{"x": 1}}{END_CALL}{END_CALLS}'
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, [0], (), is_chat=True, has_tools=True)
    texts = [stream.push(i)[0] for i in ids] + [stream.finish()]
    assert "".join(texts) == text
    done = Completion(
        request_id="r", prompt_ids=[0], token_ids=ids, text=text, finish_reason="stop"
    )
    answer = parse_answer(asked, done, tokenizer)
    assert (answer.content, answer.finish_reason) == ("Yes.", "tool_calls")
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"x": 1}')]
    pieces = PieceStream(asked, tokenizer, [0])
    outputs = [
        RequestOutput(request_id="r", new_token_ids=[i], new_text=t)
        for i, t in zip([*ids, 0], texts, strict=True)
    ]
    outputs[-1].completion = done
    found = [piece for output in outputs for piece in pieces.push(output)]
    assert "".join(piece.text for piece in found if isinstance(piece, Text)) == "Yes."
    assert "".join(p.text for p in found if isinstance(p, CallArguments)) == '{"x": 1}'
    assert pieces.finish_reason("stop") == "tool_calls"


def test_a_torn_call_is_text_in_a_whole_answer() -> None:
    tokenizer = model()
    text = f'Yes.{CALLS}{CALL}f{SEP}{{"x": '
    ids = tokenizer.encode(text, add_special_tokens=False)
    done = Completion(
        request_id="r", prompt_ids=[0], token_ids=ids, text=text, finish_reason="length"
    )
    answer = parse_answer(request(tools=[TOOL]), done, tokenizer)
    assert answer.content == f'Yes.{CALL}f{SEP}{{"x": '
    assert (answer.calls, answer.finish_reason) == ([], "length")
