"""The part of a server that HTTP requests meet: its state, its limits, the way to the engine.

All methods run in the event loop's thread, except where they say otherwise.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from queue import SimpleQueue
from threading import Event
from typing import Any

from dsv3.engine.engine import Engine
from dsv3.errors import CheckpointError, RequestError
from dsv3.request import Request, RequestOutput
from dsv3.serve.answers import MAX_UNREAD_TOKENS, Answer, HttpError
from dsv3.serve.engine_loop import Cancel, Delivery, Drain, EngineLoop, Inbox, Submit
from dsv3.text.chat import AnyFormat
from dsv3.text.defaults import Defaults

log = logging.getLogger(__name__)


class Status(Enum):
    """The state of a server, as `/health` reports it."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_waiting: answers in line beyond those that run; more requests are refused (429).
        max_body_bytes: longest body of a request.
        request_seconds: time after which an answer is cut; None is no limit.
    """

    max_waiting: int = 1024
    max_body_bytes: int = 16 << 20
    request_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server serves: a model under a name, with defaults of its requests."""

    model: str
    fingerprint: str
    chat_format: AnyFormat | None
    defaults: Defaults


class Front:
    """State of a server, and the way of a request to the engine and back.

    Attributes:
        served: the model.
        limits: of requests.
        status, reason: state of the server, and the error if it has failed.
        layout: names and values of the layout, for the metrics.
        created: seconds since 1970 at which the server was started.
        encoder: one thread in which prompts are written and encoded: formats of chats are not
            thread-safe, and the event loop goes on meanwhile.
    """

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served = served
        self.limits = limits
        self.status = Status.LOADING
        self.reason = ""
        self.created = int(time.time())
        self.layout: Mapping[str, str] = {}
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self._engine: Engine | None = None
        self._inbox: Inbox = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[Answer] = set()

    # Called by the main thread.

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the event loop of the HTTP server."""
        self._loop = loop

    def serve(self, engine: Engine, layout: Mapping[str, str]) -> None:
        """Answer requests until drained; `layout` is for the metrics."""
        self.layout = layout
        self._engine = engine
        self.status = Status.READY
        EngineLoop(engine, self._inbox, self._deliver).run()

    def drain(self, seconds: float) -> None:
        """Accept no more requests, and end `serve`. May be called by a signal handler."""
        self.status = Status.DRAINING
        self._inbox.put(Drain(seconds))

    def fail(self, reason: str, seconds: float = 1.0) -> None:
        """Tell all clients that the server has failed; wait until they know, or some seconds.

        Called by any thread but the event loop's.
        """
        self.reason = reason
        self.status = Status.FAILED
        until = time.monotonic() + seconds
        if self._loop is None:
            return
        told = Event()
        with _closed_loop_ignored():
            self._loop.call_soon_threadsafe(self._fail_all, told)
            told.wait(seconds)
        while self._open and time.monotonic() < until:
            time.sleep(0.01)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        assert self._loop is not None
        with _closed_loop_ignored():
            self._loop.call_soon_threadsafe(self._receive, deliveries)

    # Called by the event loop's thread.

    def _fail_all(self, told: Event) -> None:
        for answer in self._open:
            answer.push(HttpError(self.reason, 503))
        told.set()

    def _receive(self, deliveries: list[Delivery]) -> None:
        for answer, item in deliveries:
            answer.push(item)
            if isinstance(item, RequestOutput) and answer.num_unread > MAX_UNREAD_TOKENS:
                self._inbox.put(Cancel(tuple(answer.unfinished)))
                answer.push(HttpError("the client does not read its answer", 503))

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            HttpError: the server is not ready.
        """
        if self.status is not Status.READY or self._engine is None:
            reason = f"the server is {self.status.value}"
            raise HttpError(f"{reason}: {self.reason}" if self.reason else reason, 503, None, 5)
        return self._engine

    def now(self) -> int:
        """Return the seconds since 1970."""
        return int(time.time())

    def counts(self) -> tuple[int, int]:
        """Return the running and the waiting requests."""
        if self._engine is None:
            return 0, 0
        metrics = self._engine.metrics
        return metrics.running, metrics.waiting

    async def encoded(self, job: Callable[[], Any]) -> Any:
        """Run a job in the encoder's thread; its errors are the client's.

        Raises:
            HttpError: the request cannot be served.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.encoder, job)
        except (RequestError, CheckpointError) as error:
            raise HttpError(str(error), 400) from None
        except RecursionError:
            raise HttpError("the body is nested too deeply", 400) from None

    @contextmanager
    def answering(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Submit requests; those that are unfinished at the end of the block are cancelled.

        Raises:
            HttpError: too many requests are waiting.
        """
        engine = self.engine
        num_open = sum(len(answer.unfinished) for answer in self._open)
        if num_open + len(requests) > engine.max_running + self.limits.max_waiting:
            raise HttpError(f"{num_open} answers are in line; try again later", 429, None, 1)
        answer = Answer(request.request_id for request in requests)
        self._open.add(answer)
        self._inbox.put(Submit(answer, requests))
        try:
            yield answer
        finally:
            self._open.discard(answer)
            if answer.unfinished:
                self._inbox.put(Cancel(tuple(answer.unfinished)))

    def check_model(self, model: str) -> None:
        """Raise HttpError for another model than the served one; no name means the served one."""
        if model not in ("", self.served.model):
            message = f"model={json.dumps(model)[:80]} is not served; use {self.served.model}"
            raise HttpError(message, 404, "model_not_found")


@contextmanager
def _closed_loop_ignored() -> Iterator[None]:
    """Ignore the error of a call to an event loop that has ended: nobody waits any more."""
    try:
        yield
    except RuntimeError:
        log.debug("the event loop has ended")
