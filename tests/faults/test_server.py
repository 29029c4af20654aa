"""A server under its clients' and its ranks' faults, on two ranks as users start it."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_forked
from tests.programs import GENERATE, HANG_SECONDS, ranks_of
from tests.server import CHAT, QUESTION, SERVE, Server

pytestmark = pytest.mark.slow
COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"
LONG = {"messages": QUESTION, "ignore_eos": True, "max_tokens": 4000, "temperature": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started
        assert "Traceback" not in started.log


def is_idle(server: Server) -> bool:
    return server.metric("dsv3_running") == server.metric("dsv3_pages_used") == 0


def test_streams_equal_the_batch_file(server: Server, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": f"The code is {i}. What is the code?"}],
            "max_tokens": 40,
            "temperature": float(i % 2),
            "seed": i,
            "n": 1 + i % 3,
        }
        for i in range(16)
    ]
    rows = [
        {"custom_id": str(i), "method": "POST", "url": CHAT, "body": body}
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input-file", str(tmp_path / "rows.jsonl"), "--output-file", str(tmp_path / "out")]
    done = run_forked([GENERATE, *files], num_ranks=2)
    assert done.returncode == 0, done.stderr
    want = {}
    for line in (tmp_path / "out").read_text().splitlines():
        result = json.loads(line)
        choices = result["response"]["body"]["choices"]
        want[int(result["custom_id"])] = [
            (choice["message"]["content"], choice["finish_reason"]) for choice in choices
        ]

    def read(i: int) -> list[tuple[str, str]]:
        texts = [""] * bodies[i]["n"]
        reasons = [""] * bodies[i]["n"]
        for event in server.stream(CHAT, bodies[i]):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                reasons[choice["index"]] = choice["finish_reason"] or ""
        return list(zip(texts, reasons, strict=True))

    with ThreadPoolExecutor(16) as pool:
        got = dict(enumerate(pool.map(read, range(16))))
    assert got == want


def test_clients_that_go_leave_no_page(server: Server) -> None:
    for i in range(20):
        events = server.stream(CHAT, LONG | {"seed": i})
        for _ in range(i % 4):
            next(events)
        events.close()  # type: ignore[attr-defined]
    connection = server.connect()  # and one without a stream
    headers = {"Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(LONG).encode(), headers)
    server.wait_until(lambda: server.health()[1]["running"] > 0)
    connection.close()
    server.wait_until(lambda: is_idle(server))


def test_schemas_and_forced_calls_hold(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    body = {"messages": QUESTION, "temperature": 1.0, "max_tokens": 120, "n": 4}
    status, answer = server.post(CHAT, body | {"response_format": form, "seed": 3})
    assert status == 200, answer
    for choice in answer["choices"]:
        value = json.loads(choice["message"]["content"])
        assert list(value) == ["a", "b"] and set(value["b"]) <= {"x", "y"} and value["b"]
    choice = {"tool_choice": {"type": "function", "function": {"name": "look"}}}
    status, answer = server.post(CHAT, body | {"tools": [tool], "seed": 3} | choice)
    assert status == 200, answer
    for entry in answer["choices"]:
        (call,) = entry["message"]["tool_calls"]
        assert entry["finish_reason"] == "tool_calls"
        assert list(json.loads(call["function"]["arguments"])) == ["a", "b"]


def malformed(valid: dict[str, Any], draw: random.Random) -> bytes:
    """Return a body with one or two fields replaced, dropped or nested, or torn JSON."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        10**30,
        1e308,
        "",
        "x" * 300,
        [],
        {},
        [[]],
        {"a": {}},
        "\ud800",
        [None],
    ]
    names = [*valid, "tools", "tool_choice", "response_format", "stop", "logprobs", "n", "seed"]
    names += ["stream", "stream_options", "thinking", "logit_bias", "stop_token_ids", "system"]
    body = dict(valid)
    for _ in range(draw.randint(1, 2)):
        body[draw.choice(names)] = draw.choice(odd)
    data = json.dumps(body).encode()
    return data[: draw.randint(1, len(data))] if draw.random() < 0.2 else data


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, "/tokenize", "/detokenize"])
def test_malformed_bodies_are_the_clients_fault(server: Server, path: str) -> None:
    draw = random.Random(path)
    valid = {"messages": QUESTION, "max_tokens": 2}
    if path in (COMPLETIONS, "/detokenize"):
        valid = {"prompt": "What", "max_tokens": 2} if path == COMPLETIONS else {"tokens": [5]}
    raws = [malformed(valid, draw) for _ in range(60)]
    raws += [b"", b"[" * 100_000, b"\xff", b"null", b'{"messages": NaN}', b'{"a": 1, "a": 2}']
    for raw in raws:
        status, text = server.send("POST", path, raw=raw)
        assert status in (200, 400, 404), (raw[:200], status, text[:200])
        if status != 200:
            assert json.loads(text)["error"]["message"], raw[:200]
    server.wait_until(lambda: is_idle(server))


def test_an_upload_that_breaks_off_is_one_line(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    server.wait_until(lambda: "499: the client disconnected" in server.log)
    assert "Traceback" not in server.log


def test_requests_beyond_the_limits_are_refused() -> None:
    flags = ["--api-key", "k", "--max-body-bytes", "2000", "--max-waiting", "0"]
    flags += ["--max-running", "1", "--request-seconds", "2"]
    with Server(*flags) as server:
        key = {"Authorization": "Bearer k"}
        assert server.send("GET", "/v1/models")[0] == 401
        assert server.send("GET", "/metrics", headers={"x-api-key": "l"})[0] == 401
        assert server.send("GET", "/v1/models", headers={"x-api-key": "k"})[0] == 200
        long = {"messages": [{"role": "user", "content": "x" * 3000}]}
        assert server.post(CHAT, long, key)[0] == 413
        kind = {"Content-Type": "text/plain"}
        assert server.send("POST", CHAT, {"messages": QUESTION}, headers=key | kind)[0] == 415
        kind = {"Content-Type": ""}  # as a page of another site can send
        assert server.send("POST", CHAT, {"messages": QUESTION}, headers=key | kind)[0] == 415
        assert server.send("DELETE", CHAT, headers=key)[0] == 405
        assert server.post(CHAT, {"messages": QUESTION, "n": 2}, key)[0] == 400
        with ThreadPoolExecutor(1) as pool:
            cut = pool.submit(server.post, CHAT, LONG, key)
            server.wait_until(lambda: server.health()[1]["running"])
            status, answer = server.post(CHAT, {"messages": QUESTION}, key)
            assert status == 429, answer
            status, answer = cut.result()
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")
        assert answer["usage"]["completion_tokens"] < LONG["max_tokens"]  # type: ignore[operator]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_rank_ends_all_answers(sent: signal.Signals) -> None:
    with Server("--rank-timeout", "3") as server:

        def ask(number: int) -> str:
            body = LONG | {"seed": number}
            match number % 3:
                case 0:
                    return str(list(server.stream(CHAT, body))[-1].get("error"))
                case 1:
                    status, answer = server.post(CHAT, body)
                    return f"{status} {answer}"
            body = {"messages": QUESTION, "max_tokens": 4000, "temperature": 2.0, "top_k": 0}
            return str(list(server.stream(MESSAGES, body))[-1])

        with ThreadPoolExecutor(9) as pool:
            answers = pool.map(ask, range(9))
            server.wait_until(lambda: server.health()[1]["running"] >= 6)
            os.kill(ranks_of(server.process.pid)[1], sent)
            found = list(answers)
        for number, text in enumerate(found):
            if number % 3 < 2 or "message_stop" not in text:  # that one had ended before
                assert "rank 1" in text, text
        assert all(text.startswith("503 ") for text in found[1::3])
        assert server.process.wait(HANG_SECONDS) == 1  # torchrun's code
        assert "error: rank 1" in server.log
        assert re.search(r"rank *: 0 .*?exitcode *: 3 ", server.log, re.DOTALL)


def test_sigterm_lets_answers_finish() -> None:
    with Server() as server:
        events = server.stream(CHAT, LONG | {"max_tokens": 60})
        next(events)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.health()[0] == 503)
        assert server.post(CHAT, {"messages": QUESTION})[0] == 503
        assert server.metric("dsv3_running") == 1
        last = [choice for event in events for choice in event["choices"]][-1]
        assert last["finish_reason"] == "length"
        server.process.wait(HANG_SECONDS)
        assert time.monotonic() - begin < HANG_SECONDS
        assert "stopped" in server.log


def test_one_rank_ends_with_zero_after_sigint() -> None:
    with Server("--drain-seconds", "0.2", ranks=1) as alone:
        events = alone.stream(CHAT, LONG)
        next(events)
        alone.process.send_signal(signal.SIGINT)
        assert list(events)[-1]["error"]["message"] == "the server is stopping"
        assert alone.process.wait(HANG_SECONDS) == 0


def test_a_port_in_use_is_one_line() -> None:
    with Server(ranks=1) as server:
        second = subprocess.run(
            [sys.executable, SERVE, "--port", str(server.port)], capture_output=True, text=True
        )
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: --port={server.port} cannot be listened on")
    assert second.stderr.count("\n") == 1
