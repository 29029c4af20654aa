"""State and limits of a server, which passes HTTP requests to the engine and back.

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
from dsv3.request import Request
from dsv3.serve.answers import MAX_UNREAD_TOKENS, Answer, HttpError
from dsv3.serve.engine_loop import Cancel, Drain, EngineLoop, Inbox, Submit
from dsv3.serve.outbox import Delivery
from dsv3.text.chat import AnyFormat
from dsv3.text.defaults import Defaults

log = logging.getLogger(__name__)

_ENCODERS = 4
_FAIL_SECONDS = 1.0  # to send failures to clients


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
        max_waiting: queued completions beyond the running ones; more are refused (429).
        max_body_bytes: longest body of a request.
        request_seconds: time after which an answer is cut; None is no limit.
    """

    max_waiting: int = 1024
    max_body_bytes: int = 16 << 20
    request_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model under a name, with the defaults of its requests."""

    model: str
    fingerprint: str
    chat_format: AnyFormat | None
    defaults: Defaults


class Front:
    """State of a server, and the path of a request to the engine and back.

    Attributes:
        served: the model.
        limits: of requests.
        status, reason: state of the server, and the error if it has failed.
        layout: names and values of the layout, for the metrics.
        created: seconds since 1970 at which the server was started.
        encoder: threads that render and encode prompts and compile schemas, beside the event loop;
            a long prompt does not delay the others.
    """

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served = served
        self.limits = limits
        self.status = Status.LOADING
        self.reason = ""
        self.created = int(time.time())
        self.layout: Mapping[str, str] = {}
        self.encoder = ThreadPoolExecutor(_ENCODERS, "encoder")
        self._engine: Engine | None = None
        self._inbox: Inbox = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[Answer] = set()
        self._num_preparing = 0
        self._drain_until = 0.0

    # Called by the main thread.

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the event loop of the HTTP server."""
        self._loop = loop

    def serve(self, engine: Engine, layout: Mapping[str, str]) -> None:
        """Answer requests until drained; `layout` is for the metrics."""
        self.layout = layout
        self._engine = engine
        if self.status is Status.LOADING:  # a signal may have come before
            self.status = Status.READY
        EngineLoop(engine, self._inbox, self._deliver).run()
        self._end_all(HttpError("the server is stopping", 503))  # submitted after the last step

    def drain(self, seconds: float) -> None:
        """Accept no more requests, and end `serve`. May be called by a signal handler."""
        self._drain_until = time.monotonic() + seconds
        if self.status is not Status.FAILED:  # torchrun ends all ranks when one has failed
            self.status = Status.DRAINING
        self._inbox.put(Drain(seconds))

    @property
    def drain_seconds_left(self) -> float:
        """Seconds that are left of the time to drain; 0 if there are none."""
        return max(0.0, self._drain_until - time.monotonic())

    def fail(self, reason: str) -> None:
        """Send an error to all clients; wait until it is sent, but not longer than a second.

        May be called by any thread except the event loop's.
        """
        self.reason = reason
        self.status = Status.FAILED
        self._end_all(HttpError(reason, 503))

    def _end_all(self, failure: HttpError) -> None:
        """End all open answers with a failure; wait until they are sent, or a second."""
        if self._loop is None:
            return
        until = time.monotonic() + _FAIL_SECONDS
        pushed = Event()
        with _closed_loop_ignored():
            self._loop.call_soon_threadsafe(self._fail_all, failure, pushed)
            pushed.wait(_FAIL_SECONDS)
        while self._open and time.monotonic() < until:
            time.sleep(0.01)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        assert self._loop is not None
        with _closed_loop_ignored():
            self._loop.call_soon_threadsafe(self._receive, deliveries)

    # Called by the event loop's thread.

    def _fail_all(self, failure: HttpError, pushed: Event) -> None:
        for answer in self._open:
            answer.push(failure)
        pushed.set()

    def _receive(self, deliveries: list[Delivery]) -> None:
        for answer, item in deliveries:
            answer.push(item)
            if isinstance(item, HttpError):
                continue
            if answer.num_unread(item.request_id) > MAX_UNREAD_TOKENS:
                self._inbox.put(Cancel(tuple(answer.unfinished)))
                answer.push(HttpError("the client does not read its answer", 503))

    @property
    def engine(self) -> Engine:
        """The engine, for new requests.

        Raises:
            HttpError: the server is not ready.
        """
        if self.status is not Status.READY:
            raise self._unready()
        return self.loaded_engine

    @property
    def loaded_engine(self) -> Engine:
        """The engine, also while the server drains.

        Raises:
            HttpError: the model is not loaded, or the server has failed.
        """
        if self._engine is None or self.status is Status.FAILED:
            raise self._unready()
        return self._engine

    def _unready(self) -> HttpError:
        reason = f"the server is {self.status.value}"
        return HttpError(f"{reason}: {self.reason}" if self.reason else reason, 503, None, 5)

    def counts(self) -> tuple[int, int]:
        """Return the running and the waiting requests."""
        if self._engine is None:
            return 0, 0
        metrics = self._engine.metrics
        return metrics.running, metrics.waiting

    async def encoded(self, job: Callable[[], Any]) -> Any:
        """Run a job in one of the encoder's threads; its errors are the client's.

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
    def preparing(self) -> Iterator[None]:
        """Count a request while its body is read and encoded.

        Raises:
            HttpError: too many requests are waiting.
        """
        self._check_room(1)
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1

    def _check_room(self, number: int) -> None:
        """Raise HttpError if the queue has no room for a number of completions."""
        room = self.engine.max_running + self.limits.max_waiting
        if number > room:
            message = f"{number} completions are more than the {room} that may run and wait"
            raise HttpError(message, 400)
        num_open = self._num_preparing + sum(len(answer.unfinished) for answer in self._open)
        if num_open + number > room:
            raise HttpError(f"{num_open} completions are queued; try again later", 429, None, 1)

    @contextmanager
    def answering(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Submit requests; at the end of the block, unfinished ones are cancelled.

        Raises:
            HttpError: too many requests are waiting.
        """
        self._check_room(len(requests))
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
    """Ignore the error of a call to an event loop that has ended, and with it all connections."""
    try:
        yield
    except RuntimeError:
        log.debug("the event loop has ended")
