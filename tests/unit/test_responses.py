"""Responses to clients that read slowly, or not at all, and the line of the log."""

import asyncio
import json
import logging
from typing import Any, cast
from unittest.mock import Mock

import pytest

from dsv3.engine.engine import Engine
from dsv3.request import Completion, Request, RequestOutput, SamplingParams
from dsv3.serve import responses
from dsv3.serve.answers import Answer
from dsv3.serve.engine_loop import Cancel, Submit
from dsv3.serve.front import Front, Limits, Served, Status
from dsv3.serve.jobs import Job
from dsv3.serve.responses import AnswerResponse
from dsv3.text.defaults import Defaults


class FakeEngine:
    max_running = 8


class FakeWriter:
    response_id = "r"
    end = "end"

    def start(self) -> list[dict[str, Any]]:
        return []

    def push(self, output: RequestOutput) -> list[dict[str, Any]]:
        return [{"text": output.new_text}]

    def finish(self) -> list[dict[str, Any]]:
        return []

    def event(self, data: dict[str, Any]) -> str:
        return str(data.get("text"))

    def whole(self, completions: Any) -> dict[str, Any]:
        return {"answers": len(completions)}

    def error(self, message: str, status: int, code: str | None = None) -> dict[str, Any]:
        return {"text": message}


def make_front() -> Front:
    served = Served(model="m", fingerprint="", chat_format=None, defaults=Defaults())
    front = Front(served, Limits())
    front._engine = cast(Engine, FakeEngine())
    front.status = Status.READY
    return front


def request(number: int) -> Request:
    params = SamplingParams(n=2)
    return Request(request_id=f"r/{number}", prompt_ids=[1, 2, 3], params=params, answer=number)


def output(number: int, cached: int = 0) -> RequestOutput:
    done = Completion(
        request_id=f"r/{number}",
        prompt_ids=[1, 2, 3],
        token_ids=[4],
        text="x",
        finish_reason="stop",
        cached_tokens=cached,
        index=number,
    )
    return RequestOutput(request_id=f"r/{number}", new_token_ids=[4], new_text="x", completion=done)


async def connected() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


def submitted(front: Front) -> Answer:
    command = front._inbox.get(timeout=60)
    assert isinstance(command, Submit)
    return command.answer


def test_a_stream_that_is_not_read_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(responses, "_SEND_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    num_sent = 0

    async def send(message: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent > 1:
            await asyncio.Event().wait()

    async def main() -> None:
        front = make_front()
        job = Job([request(0), request(1)], FakeWriter(), is_stream=True)
        response = AnswerResponse(front, job, 0.0)
        answering = asyncio.create_task(response({"path": "/p"}, connected, send))
        await asyncio.sleep(0)
        submitted(front).push(output(0))
        await answering
        assert front._inbox.get(timeout=60) == Cancel(("r/1",))
        assert not front._open and num_sent == 2

    asyncio.run(main())
    assert "499 r: in 3 (0 cached)" in caplog.text
    assert "the client does not read its answer" in caplog.text


def test_comments_keep_a_stream_alive_before_its_first_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(responses, "KEEP_ALIVE_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    sent: list[bytes] = []
    is_alive = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if sent.count(b": keep-alive\n\n") == 2:
            is_alive.set()

    async def main() -> None:
        front = make_front()
        job = Job([request(0), request(1)], FakeWriter(), is_stream=True)
        answering = asyncio.create_task(
            AnswerResponse(front, job, 0.0)({"path": "/p"}, connected, send)
        )
        await asyncio.wait_for(is_alive.wait(), 60)
        answer = submitted(front)
        for number in range(2):
            answer.push(output(number, cached=2))
        await answering

    asyncio.run(main())
    assert b"".join(sent).replace(b": keep-alive\n\n", b"") == b"xxend"
    assert "200 r: in 3 (2 cached), out 2" in caplog.text


def test_half_of_a_surrogate_pair_is_written_as_an_escape() -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def main() -> None:
        front, writer = make_front(), Mock(response_id="r")
        writer.whole.return_value = {"input": "胡\ud83d"}
        job = Job([request(0)], writer, is_stream=False)
        answering = asyncio.create_task(
            AnswerResponse(front, job, 0.0)({"type": "http", "path": "/p"}, connected, send)
        )
        await asyncio.sleep(0)
        submitted(front).push(output(0))
        await answering

    asyncio.run(main())
    assert json.loads(b"".join(sent)) == {"input": "胡\ud83d"}
