"""Responses with answers of the model: a JSON body, or a stream of server-sent events."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dsv3.request import Completion, RequestOutput
from dsv3.serve.answers import Answer, HttpError
from dsv3.serve.front import Front
from dsv3.serve.jobs import Job
from dsv3.text.answer_pieces import encode_json

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 10.0
_KEEP_ALIVE = b": keep-alive\n\n"
_SEND_SECONDS = 30.0  # timeout for a client to receive a part of a response
CLIENT_GONE = 499

T = TypeVar("T")


@dataclass(slots=True)
class _Record:
    """A line of the access log; each prompt counts once, seconds are since arrival."""

    path: str
    name: str
    num_prompt: int
    begin: float
    num_cached: int = 0
    num_generated: int = 0
    first: float | None = None
    reasons: list[str] = field(default_factory=list)

    def add(self, output: RequestOutput) -> None:
        if self.first is None and output.new_token_ids:
            self.first = time.monotonic() - self.begin
        self.num_generated += len(output.new_token_ids)
        if output.completion is not None:
            if output.completion.index == 0:  # the answers to a prompt have it in common
                self.num_cached += output.completion.cached_tokens
            self.reasons.append(output.completion.finish_reason)

    def log(self, status: int, error: str = "") -> None:
        first = "-" if self.first is None else f"{self.first:.3f}"
        log.info(
            "%s %d %s: in %d (%d cached), out %d, first %s s, total %.3f s, %s",
            self.path,
            status,
            self.name,
            self.num_prompt,
            self.num_cached,
            self.num_generated,
            first,
            time.monotonic() - self.begin,
            error or " ".join(sorted(set(self.reasons))) or "cancelled",
        )


class AnswerResponse(Response):
    """Answers a job; a client that disconnects cancels it.

    Args:
        front: passes the request to the engine.
        job: the request.
        begin: monotonic seconds of its arrival.
    """

    def __init__(self, front: Front, job: Job, begin: float) -> None:
        super().__init__()
        self._front = front
        self._job = job
        self._begin = begin
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        num_prompt = sum(len(r.prompt_ids) for r in job.requests if r.answer == 0)
        record = _Record(scope["path"], job.writer.response_id, num_prompt, self._begin)
        try:
            with self._front.answering(job.requests) as answer:
                # Errors are sent within the block: a process that ends waits for open answers.
                await self._respond(answer, record, scope, receive, send)
        except HttpError as error:
            await self._refuse(error, record, scope, receive, send)

    async def _respond(
        self, answer: Answer, record: _Record, scope: Scope, receive: Receive, send: Send
    ) -> None:
        send = _in_time(send)
        if self._job.is_stream:
            work = self._stream(answer, record, send)
        else:
            work = self._whole(answer, record, scope, receive, send)
        try:
            await unless_gone(work, receive)
            record.log(200)
        except ClientDisconnect as error:
            record.log(CLIENT_GONE, str(error))
        except HttpError as error:
            await self._refuse(error, record, scope, receive, send)

    async def _whole(
        self, answer: Answer, record: _Record, scope: Scope, receive: Receive, send: Send
    ) -> None:
        done: dict[str, Completion] = {}
        while len(done) < len(self._job.requests):
            for output in await answer.read():
                record.add(output)
                if output.completion is not None:
                    done[output.request_id] = _checked(output.completion)
        completions = [done[request.request_id] for request in self._job.requests]
        # The arguments of a call may hold half of a surrogate pair, which only an escape can write.
        body = encode_json(self._job.writer.whole(completions)).encode("utf-8", "backslashreplace")
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, answer: Answer, record: _Record, send: Send) -> None:
        """Send events as tokens arrive; an error before the first one has its own HTTP status."""
        writer = self._job.writer
        num_done = 0
        while num_done < len(self._job.requests):
            outputs = await answer.read(KEEP_ALIVE_SECONDS)
            events: list[dict[str, Any]] = []
            for output in outputs:
                record.add(output)
                if output.completion is not None:
                    num_done += 1
                    _checked(output.completion)
                events += writer.push(output)
            if num_done == len(self._job.requests):
                events += writer.finish()
            await self._start(send)
            if events or not outputs:
                text = "".join(map(writer.event, events)).encode("utf-8", "surrogatepass")
                await _send(send, text or _KEEP_ALIVE)
        await _send(send, writer.end.encode(), is_last=True)

    async def _start(self, send: Send) -> None:
        if self._is_started:
            return
        self._is_started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies pass events on at once
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writer = self._job.writer
        if text := "".join(map(writer.event, writer.start())):
            await _send(send, text.encode())

    async def _refuse(
        self, error: HttpError, record: _Record, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send an error as a response, or as the last event of a stream."""
        record.log(error.status, error.message)
        writer = self._job.writer
        body = writer.error(error.message, error.status, error.code)
        if self._is_started:
            with suppress(ClientDisconnect):
                await _send(send, writer.event(body).encode(), is_last=True)
        else:
            await JSONResponse(body, error.status, retry_header(error))(scope, receive, send)


def retry_header(error: HttpError) -> dict[str, str]:
    """Return the `Retry-After` header of an error; empty if the client should not try again."""
    return {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}


def _checked(completion: Completion) -> Completion:
    """Return a completion; raise HttpError if it is an error."""
    if completion.error:
        raise HttpError(completion.error, 400 if completion.is_refused else 500)
    return completion


async def _send(send: Send, data: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not is_last})


def _in_time(send: Send) -> Send:
    """Return `send` with a timeout, after which the client counts as disconnected."""

    async def limited(message: Any) -> None:
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientDisconnect("the client does not read its answer") from None

    return limited


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of `work`; stop it when the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect("the client disconnected")
        return await working
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
