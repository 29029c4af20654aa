"""The steps behind a script's calls: rank 0 runs them as results are read, the other ranks follow.

All ranks make the same calls in the same order. When a call begins, they agree on the number of
streams that are open. For each of these rank 0 pauses once: at the stream's end, at the latest when
the next call begins; the other ranks follow its plans until a pause when they read a stream, or at
the next call. Steps serve all unfinished requests, and outputs wait here until they are read.

Python may raise KeyboardInterrupt, or the exception of a script's signal handler, at any statement.
Within a step any exception leaves pages and requests half done, and between ranks an interrupt
leaves the others in another exchange, so the session takes no further call then.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from dsv3.engine.engine import follow
from dsv3.engine.start import Started
from dsv3.errors import Dsv3Error
from dsv3.request import Completion, Request, RequestOutput


class Session:
    """One rank's part in the calls of a script.

    Args:
        started: the model on this rank.

    Attributes:
        num_calls: calls that have begun.
        is_interrupted: an exception was raised within a step, or an interrupt within an exchange.
    """

    def __init__(self, started: Started) -> None:
        self._started = started
        self._engine = started.engine
        self.num_calls = self._num_pauses = 0
        self.is_interrupted = False
        self._is_closed = False
        self._open: weakref.WeakSet[OutputStream] = weakref.WeakSet()
        self._unread: dict[str, list[RequestOutput]] = {}
        self._dropped: list[str] = []
        # Threads of a script of one rank may read streams of their own.
        self._lock = threading.RLock()

    @property
    def is_closed(self) -> bool:
        """Return True after the end."""
        return self._is_closed

    def check_open(self, call: str) -> None:
        """Raise if the session is closed or was interrupted.

        Args:
            call: for the error.
        """
        if self._is_closed:
            raise Dsv3Error(f"this LLM is closed: {call} needs a new one")
        if self.is_interrupted:
            raise Dsv3Error(f"this LLM was interrupted within a step: {call} needs a new one")

    @contextmanager
    def exchange(self, is_step: bool = False) -> Iterator[None]:
        """Run a block that all ranks must run to its end; alone, only a step must end.

        Outside of a step, all ranks see an error alike, but not an interrupt.
        """
        try:
            yield
        except BaseException as error:
            is_shared = self._started.mesh.world.size > 1
            if is_step or (is_shared and not isinstance(error, Exception)):
                self.is_interrupted = True
            raise

    def begin(self, call: str) -> None:
        """Begin a call, on all ranks."""
        self.check_open(call)
        self._let_all_go()
        with self.exchange():
            self._num_pauses = self._started.channel.share(len(self._open))
        self.num_calls += 1

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests on rank 0: all of them, or none if one cannot be served."""
        assert self._engine is not None
        with self._lock:
            self._cancel_dropped()
            for i, request in enumerate(requests):
                try:
                    self._engine.add(request)
                except BaseException:
                    for before in requests[:i]:
                        self._engine.cancel(before.request_id)
                    raise
            self._unread |= {request.request_id: [] for request in requests}

    def run(self, requests: Sequence[Request]) -> dict[str, Completion]:
        """Return the completions of requests, at the end of a call; none on other ranks."""
        unfinished = {request.request_id for request in requests}
        done: dict[str, Completion] = {}
        try:
            while unfinished:
                for output in self._read(unfinished):
                    if output.completion is not None:
                        done[output.request_id] = output.completion
                unfinished -= done.keys()
        finally:
            self.drop(unfinished)
            if not self.is_interrupted:
                self._pause()
        return done

    def stream(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        """Return the outputs of requests, made as they are read; on other ranks there are none."""
        self._num_pauses += 1
        if self._engine is None:
            return NoOutputs(self)
        stream = OutputStream(self, [request.request_id for request in requests])
        self._open.add(stream)
        return stream

    def end(self, stream: "OutputStream") -> None:
        """Let the other ranks go on after a stream has been read."""
        if stream in self._open:
            self._open.discard(stream)
            if self._num_pauses and not self.is_interrupted:
                self._num_pauses -= 1
                self._pause()

    def follow(self) -> None:
        """Follow rank 0 until it has read a stream, on the other ranks."""
        if self._num_pauses:
            self._num_pauses -= 1
            self._pause()

    def close(self) -> None:
        """End all requests; the cache is saved to disk, if there is a disk cache."""
        self.drop(list(self._unread))
        self._let_all_go()
        self._is_closed = True
        if self._engine is None:
            follow(self._started.runner, self._started.channel)
        else:
            self._cancel_dropped()
            self._engine.stop()
        self._free()

    def abandon(self) -> None:
        """Close without the other ranks, which may be anywhere."""
        self._is_closed = True
        self._free()

    def _free(self) -> None:
        """Release the model, since the script may keep its streams."""
        del self._started, self._engine

    def drop(self, request_ids: Iterable[str]) -> None:
        """Stop requests at the next step or call; may be called during either."""
        self._dropped += request_ids

    def read(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Return new outputs of unfinished requests on rank 0; run steps until there are some."""
        self.check_open("stream()")
        return self._read(request_ids)

    def _let_all_go(self) -> None:
        while self._num_pauses:
            self._num_pauses -= 1
            self._pause()

    def _pause(self) -> None:
        """Follow until rank 0 pauses; on rank 0, make the other ranks return from `follow`."""
        with self.exchange():
            if self._engine is None:
                follow(self._started.runner, self._started.channel)
            else:
                self._engine.pause()

    def _read(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        assert self._engine is not None
        while True:
            with self._lock:
                found = [output for name in list(request_ids) for output in self._take(name)]
                if found:
                    return found
                self._cancel_dropped()
                with self.exchange(is_step=True):
                    for output in self._engine.step():
                        if output.request_id in self._unread:
                            self._unread[output.request_id].append(output)

    def _take(self, request_id: str) -> list[RequestOutput]:
        outputs = self._unread[request_id]
        if outputs and outputs[-1].completion is not None:
            del self._unread[request_id]
        else:
            self._unread[request_id] = []
        return outputs

    def _cancel_dropped(self) -> None:
        while self._dropped:
            name = self._dropped.pop()
            self._unread.pop(name, None)
            if self._engine is not None:
                self._engine.cancel(name)


class OutputStream(Iterator[RequestOutput]):
    """Outputs of some requests on rank 0, made as they are read.

    Requests whose stream is dropped before its end are stopped.
    """

    def __init__(self, session: Session, request_ids: Sequence[str]) -> None:
        self._session = session
        self._unfinished = dict.fromkeys(request_ids)
        self._outputs: deque[RequestOutput] = deque()
        weakref.finalize(self, session.drop, tuple(request_ids)).atexit = False

    def __next__(self) -> RequestOutput:
        """Return the next output of any of the requests."""
        if not self._outputs and self._unfinished:
            for output in self._session.read(self._unfinished):
                self._outputs.append(output)
                if output.completion is not None:
                    del self._unfinished[output.request_id]
        if not self._outputs:
            self._session.end(self)
            raise StopIteration
        return self._outputs.popleft()


class NoOutputs(Iterator[Any]):
    """The stream of another rank than 0: reading it helps rank 0 read its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._helped_in = 0

    def __next__(self) -> NoReturn:
        """Follow rank 0 until it has read a stream, once after every call."""
        if self._helped_in != self._session.num_calls:
            self._helped_in = self._session.num_calls
            self._session.follow()
        raise StopIteration

    def close(self) -> None:
        """Do nothing; on rank 0 this stops the answer."""
