"""A server whose model has a form of calls: strict tools, with the clients that people use."""

import copy
import importlib
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from dsv3.text.tools import CallForm
from tests.call_marks import copy_demo
from tests.odd_bodies import ODD, mutated
from tests.server import CHAT, QUESTION, Server

pytest.importorskip("llguidance", reason="schemas need llguidance: pip install llguidance")
pytestmark = pytest.mark.slow
FORM = CallForm.DEEPSEEK
FIRST_MARK = 2048 - len(FORM.marks)
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "strict": True, "parameters": PARAMETERS}}
KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf"),
    *("oneOf", "allOf", "$ref", "$defs", "pattern", "format", "minLength", "maxLength", "minimum"),
    *("maxItems", "not", "if", "x-guidance", "description", "a"),
)
# The bias makes the model call: it was not trained to.
ASKED: dict[str, Any] = {
    "model": "demo",
    "messages": QUESTION,
    "tools": [TOOL],
    "parallel_tool_calls": False,
    "temperature": 1.0,
    "max_tokens": 200,
    "logit_bias": {str(FIRST_MARK): 100},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = copy_demo(tmp_path_factory.mktemp("model") / "demo", FORM.marks)
    with Server("--ckpt-path", str(folder), "--speculative-tokens", "2") as started:
        yield started
        assert "Traceback" not in started.log


def assert_valid(arguments: str) -> None:
    found = json.loads(arguments)
    assert list(found) == ["city", "days"]
    assert len(found["city"]) <= 12 and set(found["days"]) <= {1, 2, 3} and found["days"]


def test_arguments_are_always_valid(server: Server) -> None:
    for seed in range(4):
        status, answer = server.post(CHAT, ASKED | {"n": 8, "seed": seed})
        assert status == 200, answer
        for choice in answer["choices"]:
            (call,) = choice["message"]["tool_calls"]
            assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "look")
            assert choice["message"]["content"] is None
            assert_valid(call["function"]["arguments"])


def test_a_client_streams_calls(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai package")
    url = f"http://127.0.0.1:{server.port}"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        for seed in range(4):
            name, arguments, reason = "", "", None
            for chunk in client.chat.completions.create(**ASKED, seed=seed, stream=True):
                reason = chunk.choices[0].finish_reason or reason
                for call in chunk.choices[0].delta.tool_calls or []:
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
            assert (name, reason) == ("look", "tool_calls")
            assert_valid(arguments)


def test_an_answer_may_be_json_instead(server: Server) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for bias, is_call in ((100, True), (-100, False)):
        body = ASKED | {"response_format": form, "logit_bias": {str(FIRST_MARK): bias}, "n": 4}
        status, answer = server.post(CHAT, body)
        assert status == 200, answer
        for choice in answer["choices"]:
            assert bool(choice["message"].get("tool_calls")) == is_call
            if not is_call:
                assert set(json.loads(choice["message"]["content"])) <= {"a", "b"}


def odd_schema(draw: random.Random, depth: int = 0) -> Any:
    """Return something like a JSON schema, mostly a wrong one."""
    if depth > 3 or draw.random() < 0.3:
        return copy.deepcopy(
            draw.choice((*ODD, "string", "#", "#/$defs/d", "^a|b$", "(", [1, "a"]))
        )
    names = draw.choices(KEYWORDS, k=draw.randint(0, 4))
    return {name: odd_schema(draw, depth + 1) for name in names}


def test_strict_tools_of_any_schema_are_answered_or_refused(server: Server) -> None:
    draw = random.Random(0)
    for number in range(120):
        body = copy.deepcopy(ASKED) | {"max_tokens": 8, "stream": number % 2 == 0}
        body["tools"][0]["function"]["parameters"] = odd_schema(draw)
        raw = json.dumps(body).encode() if number % 3 else mutated(ASKED | {"max_tokens": 8}, draw)
        status, text = server.send("POST", CHAT, raw=raw)
        assert status in (200, 400, 404), (raw, text[:300])
        assert "server_error" not in text, (raw, text[-300:])
    server.wait_until(
        lambda: server.metric("dsv3_running") == server.metric("dsv3_pages_used") == 0
    )


def test_anthropic_calls_of_strict_tools(server: Server) -> None:
    anthropic = importlib.import_module("anthropic")
    tool = {"name": "look", "strict": True, "input_schema": PARAMETERS}
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    url = f"http://127.0.0.1:{server.port}"
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        message = client.messages.create(
            model="demo", max_tokens=60, messages=QUESTION, tools=[tool], tool_choice=one
        )
    assert {block.type for block in message.content} <= {"text", "tool_use"}
