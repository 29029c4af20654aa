"""A server whose cache is too small for its load, with drafts: its answers and its pages."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_forked
from tests.programs import GENERATE, HANG_SECONDS
from tests.server import CHAT, QUESTION, Server

pytestmark = pytest.mark.slow
COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"
FLAGS = ["--kv-cache-size", "448tok", "--speculative-tokens", "2", "--max-batch-tokens", "128"]
LONG = {"max_tokens": 300, "ignore_eos": True, "temperature": 1}
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": -5, "maximum": 17},
        "enum": {"enum": ["日本", 'é"\n', None]},
        "</think>": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
        "node": {"$ref": "#/$defs/node"},
    },
    "required": ["id", "enum", "</think>", "node"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "anyOf": [
                {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
                {"type": "null"},
            ]
        }
    },
}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(*FLAGS) as started:
        yield started
        assert "Traceback" not in started.log


def is_idle(server: Server) -> bool:
    names = ("dsv3_running", "dsv3_waiting", "dsv3_pages_used")
    return not any(server.metric(name) for name in names)


def rows() -> list[tuple[str, dict[str, Any]]]:
    """Return requests of all kinds."""
    found: list[tuple[str, dict[str, Any]]] = []
    for i in range(8):
        asked = [{"role": "user", "content": f"The code is {i}. What is the code?"}]
        chat = {"messages": asked, "max_tokens": 12, "seed": i}
        ids = {"prompt": [100 + i] * 60, "max_tokens": 8, "ignore_eos": True, "seed": i}
        found += [
            (CHAT, chat | {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
            (CHAT, chat | {"temperature": 1, "n": 2}),
            (CHAT, chat | {"temperature": 1.2, "max_tokens": 60, "response_format": FORM}),
            (CHAT, chat | {"temperature": 0.8, "stop": [" is", "e."], "repetition_penalty": 1.2}),
            (CHAT, chat | {"temperature": 0, "logit_bias": {"300": 2}}),
            # These go first, all at once, and some must give way.
            (COMPLETIONS, ids | {"temperature": 0, "max_tokens": 100, "priority": -1}),
            (COMPLETIONS, ids | {"temperature": 0.7, "top_p": 0.9, "logprobs": 2}),
            (COMPLETIONS, ids | {"temperature": 0, "prompt": f"Once {i} upon a time " * 8}),
        ]
    return found


def facts(choice: dict[str, Any]) -> tuple[Any, ...]:
    """Return text, tokens with log-probabilities, and finish reason of a choice."""
    logprobs = choice.get("logprobs") or {}
    entries = [entry["token"] for entry in logprobs.get("content") or []]
    entries += logprobs.get("tokens") or []
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, entries, choice["finish_reason"]


def streamed(server: Server, path: str, body: dict[str, Any]) -> list[tuple[Any, ...]]:
    number = body.get("n", 1)
    texts = [""] * number
    tokens: list[list[str]] = [[] for _ in range(number)]
    reasons = [None] * number
    for event in server.stream(path, body):
        for choice in event["choices"]:
            i = choice["index"]
            texts[i] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            logprobs = choice.get("logprobs") or {}
            tokens[i] += [entry["token"] for entry in logprobs.get("content") or []]
            tokens[i] += logprobs.get("tokens") or []
            reasons[i] = choice["finish_reason"] or reasons[i]
    return list(zip(texts, tokens, reasons, strict=True))


def test_64_streams_equal_the_batch_file_of_one_rank(server: Server, tmp_path: Path) -> None:
    asked = rows()
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": path, "body": body})
        for i, (path, body) in enumerate(asked)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    files = ["--input-file", str(tmp_path / "rows.jsonl"), "--output-file", str(tmp_path / "out")]
    done = run_forked([GENERATE, *files])
    assert done.returncode == 0, done.stderr
    want = {}
    for line in (tmp_path / "out").read_text().splitlines():
        result = json.loads(line)
        want[int(result["custom_id"])] = list(map(facts, result["response"]["body"]["choices"]))
    with ThreadPoolExecutor(64) as pool:
        got = dict(enumerate(pool.map(lambda row: streamed(server, *row), asked)))
    assert got == want
    assert server.metric("dsv3_preemptions_total") > 0
    assert server.metric("dsv3_accepted_tokens_total") > 0
    ended = [facts for i in range(2, 64, 8) for facts in want[i] if facts[2] == "stop"]
    assert ended
    for text, _, _ in ended:
        value = json.loads(text)
        assert -5 <= value["id"] <= 17 and value["enum"] in ("日本", 'é"\n', None)


def leaving(i: int) -> tuple[str, dict[str, Any]]:
    match i % 6:
        case 0:
            return CHAT, LONG | {"messages": QUESTION, "stream": True, "n": 2, "seed": i}
        case 1:
            return CHAT, LONG | {"messages": QUESTION, "seed": i}
        case 2:
            return MESSAGES, {"messages": QUESTION, "max_tokens": 300, "stream": True}
        case 3:
            body = {"messages": QUESTION, "max_tokens": 300, "stream": True, "temperature": 1.5}
            return CHAT, body | {"response_format": FORM, "seed": i}
        case 4:
            return COMPLETIONS, {"prompt": [100 + i] * 390, "max_tokens": 50, "stream": True}
    return COMPLETIONS, {"prompt": [200 + i] * 300, "max_tokens": 0, "echo": True, "logprobs": 2}


def test_a_hundred_clients_that_go_leave_no_page(server: Server) -> None:
    def leave(i: int) -> None:
        path, body = leaving(i)
        data = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as sock:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            match i % 4:
                case 1:
                    time.sleep(0.002 * i)
                case 2:
                    sock.settimeout(0.5)  # a response without a stream may take longer
                    try:
                        sock.recv(200)
                    except TimeoutError:
                        return
                case 3:  # the connection is reset
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(100)))
    server.wait_until(lambda: is_idle(server))
    assert server.post(CHAT, {"messages": QUESTION, "max_tokens": 2})[0] == 200


def test_comments_keep_a_stream_alive_that_waits() -> None:
    """Its first token comes only when the answer before it is complete."""
    flags = ["--max-running", "1", "--request-seconds", "12"]
    with Server(*flags, ranks=1) as server, ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(server.post, CHAT, LONG | {"messages": QUESTION, "max_tokens": 8000})
        server.wait_until(lambda: server.health()[1]["running"])
        lines: list[bytes] = []
        connection = server.connect()
        headers = {"Content-Type": "application/json"}
        body = {"messages": QUESTION, "stream": True, "max_tokens": 2}
        connection.request("POST", CHAT, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        assert response.status == 200
        lines += iter(response)
        connection.close()
        assert ahead.result()[1]["choices"][0]["finish_reason"] == "length"
    assert b": keep-alive\n" in lines and b"data: [DONE]\n" in lines
