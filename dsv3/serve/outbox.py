"""Outputs in transit from the engine's thread to the event loop's.

Each event of a stream takes interpreter time from the engine: the event loop wakes up, writes the
event and sends it. With few streams, each token is delivered at once; with many, the tokens of
several steps are delivered together. The first and the last outputs of a request never wait.
"""

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

from dsv3.request import RequestOutput
from dsv3.serve.answers import Answer, HttpError

_EVENTS_PER_SECOND = 500  # of all streams together
_MAX_SECONDS = 0.1  # between two events of a stream

Delivery = tuple[Answer, RequestOutput | HttpError]
Deliver = Callable[[list[Delivery]], None]


class Outbox:
    """Collects the outputs of steps, and delivers them when they are due.

    Args:
        deliver: passes outputs to the event loop.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._outputs: dict[Answer, list[RequestOutput]] = {}
        self._urgent: set[Answer] = set()
        self._begun: WeakKeyDictionary[Answer, set[str]] = WeakKeyDictionary()  # request ids
        self._emptied_at = 0.0

    def add(self, answer: Answer, output: RequestOutput) -> None:
        """Add an output of an answer."""
        self._outputs.setdefault(answer, []).append(output)
        begun = self._begun.setdefault(answer, set())
        if output.completion is not None or output.request_id not in begun:
            self._urgent.add(answer)
            begun.add(output.request_id)

    def drop(self, answer: Answer) -> None:
        """Forget the outputs of a cancelled answer."""
        self._outputs.pop(answer, None)
        self._urgent.discard(answer)

    def fail(self, answers: set[Answer], failure: HttpError) -> None:
        """Deliver all outputs, and end answers with a failure."""
        self.send_all()
        if answers:
            self._deliver([(answer, failure) for answer in answers])

    def send_due(self) -> None:
        """Deliver the outputs that are due after a step."""
        interval = min(_MAX_SECONDS, len(self._outputs) / _EVENTS_PER_SECOND)
        if time.monotonic() >= self._emptied_at + interval:
            self.send_all()
        else:
            self._send_urgent()

    def send_all(self) -> None:
        """Deliver all outputs."""
        self._emptied_at = time.monotonic()
        self._urgent.update(self._outputs)
        self._send_urgent()

    def _send_urgent(self) -> None:
        deliveries: list[Delivery] = [(a, o) for a in self._urgent for o in self._outputs.pop(a)]
        self._urgent.clear()
        if deliveries:
            self._deliver(deliveries)
