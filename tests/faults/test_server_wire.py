"""A server under malformed HTTP, and under bodies that are almost right."""

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.odd_bodies import mutated
from tests.programs import HANG_SECONDS
from tests.server import CHAT, QUESTION, Server

pytestmark = pytest.mark.slow
COMPLETIONS, MESSAGES, COUNT = "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a"],
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CHOICE = {"type": "function", "function": {"name": "look"}}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
STRICT = {"type": "function", "function": {"name": "s", "strict": True, "parameters": SCHEMA}}
BEGUN = {"role": "assistant", "content": "A"}
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
PARTS = [{"type": "text", "text": "Hi"}]
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": PARTS},
    {"role": "assistant", "content": "A", "reasoning_content": "r"},
    {"role": "user", "content": "B"},
]
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["a"]}
ADJUSTED = {"logit_bias": {"5": 1.5}, "presence_penalty": 0.1, "repetition_penalty": 1.1}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
VALID: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": TALK, "max_tokens": 2, "n": 2} | SAMPLED | ADJUSTED | STREAM),
    (CHAT, {"messages": TALK, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": QUESTION, "max_tokens": 2, "response_format": FORM}),
    (CHAT, {"messages": QUESTION, "max_tokens": 2, "tools": [TOOL], "tool_choice": CHOICE}),
    (CHAT, {"messages": QUESTION, "max_completion_tokens": 2, "thinking": {"type": "enabled"}}),
    (CHAT, {"messages": QUESTION, "max_tokens": 2, "tools": [STRICT], "tool_choice": "required"}),
    (CHAT, {"messages": [*QUESTION, BEGUN | {"prefix": True}], "max_tokens": 2}),
    (CHAT, {"messages": [*QUESTION, BEGUN], "max_tokens": 2} | CONTINUED),
    (COMPLETIONS, {"prompt": ["a", [5, 6]], "max_tokens": 2, "echo": True, "logprobs": 3, "n": 2}),
    (COMPLETIONS, {"prompt": "What is", "max_tokens": 1, "priority": 1, "user": "u"} | STREAM),
    (MESSAGES, {"messages": [{"role": "user", "content": PARTS}], "max_tokens": 2, "system": "s"}),
    (MESSAGES, {"messages": QUESTION, "max_tokens": 2, "stream": True, "stop_sequences": ["q"]}),
    (MESSAGES, {"messages": [*QUESTION, BEGUN], "max_tokens": 2, "output_config": {}}),
    (COUNT, {"messages": QUESTION, "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [5, 6, 7], "model": "demo-v3"}),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--max-body-bytes", "1000000", ranks=1) as started:
        yield started
        started.wait_until(lambda: is_idle(started))
        assert "Traceback" not in started.log


def is_idle(server: Server) -> bool:
    return server.metric("dsv3_running") == server.metric("dsv3_pages_used") == 0


@pytest.mark.parametrize("number", range(len(VALID)))
def test_almost_valid_bodies_are_answered_or_refused(server: Server, number: int) -> None:
    path, body = VALID[number]
    assert server.send("POST", path, body)[0] == 200
    draw = random.Random(number)
    for _ in range(60):
        raw = mutated(body, draw)
        status, text = server.send("POST", path, raw=raw)
        assert status in (200, 400, 404), (raw[:300], status, text[:300])
        if status == 200:
            assert "server_error" not in text and "api_error" not in text, (raw[:300], text[-300:])
        else:
            assert json.loads(text)["error"]["message"], raw[:300]


BODY = json.dumps({"messages": QUESTION, "max_tokens": 2}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKS = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
SIZED = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"Upgrade: h2c\r\nConnection: Upgrade\r\n"
# Statuses of the answers; two of them differ between uvicorn's parsers (httptools, h11).
WIRE: dict[str, tuple[bytes, str]] = {
    "chunks of a byte": (CHUNKED + CHUNKS, "200"),
    "HTTP/1.0": (POST.replace(b"1.1", b"1.0") + SIZED, "200"),
    "pipelined": (2 * (POST + SIZED), "200 200"),
    "no host": (POST.replace(b"Host: x\r\n", b"") + SIZED, "200|400"),
    "torn chunk": (CHUNKED + b"zz\r\n" + BODY, "400"),
    "two lengths": (POST + b"Content-Length: 5\r\n" + SIZED, "400"),
    "negative length": (POST + b"Content-Length: -5\r\n\r\n" + BODY, "400"),
    "long length": (POST + b"Content-Length: 99999999999\r\n\r\n", "413"),
    "long chunks": (CHUNKED + 40 * (b"8000\r\n" + b" " * 0x8000 + b"\r\n"), "413"),
    "no body": (POST + b"\r\n", "400"),
    "odd type": (POST.replace(b"application/json", b"\xff;=") + SIZED, "415"),
    "a byte of a key": (POST + b"Authorization: Bearer \xff\r\n" + SIZED, "200"),
    "no HTTP": (b"\x16\x03\x01\x00\xff hello\r\n\r\n", "400"),
    "odd method": (b"FOO /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", "400|405"),
    "no method": (b"GET /v1/messages HTTP/1.1\r\nHost: x\r\n\r\n", "405"),
    "odd path": (b"GET /v1/models/%ED%A0%80%00%ff HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
    "upgrade": (b"GET /health HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n", "200"),
}


@pytest.mark.parametrize("name", WIRE)
def test_malformed_http_has_a_status(server: Server, name: str) -> None:
    data, want = WIRE[name]
    answers = b""
    with socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as sock:
        sock.sendall(data)
        while len(re.findall(rb"HTTP/1.1 (\d+)", answers)) < want.count(" ") + 1:
            part = sock.recv(65536)
            assert part, answers
            answers += part
    statuses = b" ".join(re.findall(rb"HTTP/1.1 (\d+)", answers)).decode()
    assert re.fullmatch(want, statuses)


def test_bodies_that_stop_midway_leave_no_trace(server: Server) -> None:
    """The client goes away within its headers, within its body, or just after it."""
    whole = POST + SIZED
    for end in (20, len(POST) + 5, len(whole) - 10, len(whole)):
        with socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as sock:
            sock.sendall(whole[:end])
    assert server.post(CHAT, {"messages": QUESTION, "max_tokens": 2})[0] == 200


def test_a_long_prompt_does_not_hold_up_others(server: Server) -> None:
    """The status of the server comes before the tokens of a prompt of a megabyte."""
    with ThreadPoolExecutor(1) as pool:
        tokens = pool.submit(server.post, "/tokenize", {"prompt": "a" * 999_000})
        num_health = 0
        while not tokens.done():
            assert server.health()[0] == 200
            num_health += 1
            time.sleep(0.01)
    status, found = tokens.result()
    assert status == 200 and found["count"] > 8192 and num_health


def test_lists_of_too_many_prompts_are_refused(server: Server) -> None:
    status, answer = server.post(COMPLETIONS, {"prompt": ["a"] * 1025, "max_tokens": 1})
    assert status == 400 and "more than 1024 prompts" in answer["error"]["message"]


def test_a_schema_that_gives_up_within_an_answer_is_the_requests_error(server: Server) -> None:
    endless = {"type": "string", "pattern": "^(((a{30}){30}){30}){30}$"}
    form = {"type": "json_schema", "json_schema": {"schema": endless}}
    body = {"messages": QUESTION, "max_tokens": 20, "response_format": form}
    status, answer = server.post(CHAT, body)
    assert status == 400 and "cannot be followed to its end" in answer["error"]["message"]
    last = list(server.stream(CHAT, body))[-1]
    assert last["error"]["type"] == "invalid_request_error"
