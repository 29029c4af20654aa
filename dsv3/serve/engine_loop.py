"""The main loop of a server on rank 0: it takes requests, runs steps and delivers outputs.

The engine belongs to the main thread. Other threads put commands into the inbox, which is emptied
before each step; while there is nothing to do, the loop waits for a command.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from dsv3.engine.engine import Engine
from dsv3.errors import Dsv3Error, RequestError, describe_error
from dsv3.request import Request, RequestOutput
from dsv3.serve.answers import Answer, HttpError
from dsv3.serve.outbox import Deliver, Outbox

log = logging.getLogger(__name__)

_FOREVER = 3600.0


@dataclass(frozen=True, slots=True)
class Submit:
    """Answer these requests: all of them, or none if one cannot be served."""

    answer: Answer
    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop requests; unknown and finished ones are ignored."""

    request_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Drain:
    """End the loop when no request is left, at the latest after `seconds`."""

    seconds: float


Command = Submit | Cancel | Drain
Inbox = SimpleQueue[Command]


class EngineLoop:
    """Runs the engine for the requests of an inbox.

    Args:
        engine: on rank 0.
        inbox: commands of other threads.
        deliver: passes outputs to the event loop's thread.
    """

    def __init__(self, engine: Engine, inbox: Inbox, deliver: Deliver) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = Outbox(deliver)
        self._answers: dict[str, Answer] = {}  # of the unfinished requests, by their ids
        self._end: float | None = None

    def run(self) -> None:
        """Run until drained."""
        while not self._is_over():
            if not self._engine.has_work():
                self._engine.update_gauges()
                self._wait()
            self._take_all()
            if self._engine.has_work():
                self._step()
        self._abandon()

    def _step(self) -> None:
        """Run a step; if it may be long, deliver all outputs before it."""
        if self._engine.computes_prompts:
            self._outbox.send_all()
        try:
            outputs = self._engine.step()
        except BaseException:
            self._outbox.send_all()  # the tokens of the steps before
            raise
        self._route(outputs)

    def _is_over(self) -> bool:
        if self._end is None:
            return False
        return not self._engine.num_unfinished or time.monotonic() >= self._end

    def _wait(self) -> None:
        """Wait for a command, and carry it out."""
        try:
            self._do(self._inbox.get(timeout=_FOREVER))
        except Empty:
            return

    def _take_all(self) -> None:
        while True:
            try:
                self._do(self._inbox.get_nowait())
            except Empty:
                return

    def _do(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Cancel():
                for request_id in command.request_ids:
                    if answer := self._answers.pop(request_id, None):
                        self._outbox.drop(answer)
                    self._engine.cancel(request_id)
            case Drain():
                self._end = time.monotonic() + command.seconds

    def _submit(self, command: Submit) -> None:
        added: list[str] = []
        try:
            for request in command.requests:
                self._engine.add(request)
                added.append(request.request_id)
        except Exception as error:  # one bad request must not stop the others
            for request_id in added:
                self._engine.cancel(request_id)
            self._outbox.fail({command.answer}, failure_of(error))
        else:
            self._answers |= dict.fromkeys(added, command.answer)

    def _route(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if answer := self._answers.get(output.request_id):
                self._outbox.add(answer, output)
            if output.completion is not None:
                self._answers.pop(output.request_id, None)
        self._outbox.send_due()

    def _abandon(self) -> None:
        """Cancel the requests that are left when the time to drain is over."""
        for request_id in self._answers:
            self._engine.cancel(request_id)
        open_answers = set(self._answers.values())
        self._outbox.fail(open_answers, HttpError("the server is stopping", 503))


def failure_of(error: Exception) -> HttpError:
    """Return the HTTP error for a failed request."""
    if isinstance(error, RequestError):
        return HttpError(str(error), 400)
    if not isinstance(error, Dsv3Error):
        log.error("a request failed: %s", describe_error(error))
        log.debug("a request failed", exc_info=error)
    return HttpError(describe_error(error), 500)
