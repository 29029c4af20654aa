"""A checkpoint's chat template, rendered in a separate process (`template_worker.py`)."""

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError

from dsv3.errors import CheckpointError, RequestError, os_errors_as
from dsv3.text.template_worker import CPU_SECONDS, make_environment

_WORKER = Path(__file__).with_name("template_worker.py")
_MAX_CHARS = 1 << 18  # of a template; published templates have up to 30,000
_WAIT_SECONDS = 60.0  # for a reply; longer than CPU_SECONDS, since a busy machine may delay it
_QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "tools": None}
_TEMPLATE_FAULTS = ("damaged", "exceeded")  # kinds of replies that do not depend on the messages


class _Reply(NamedTuple):
    """A reply of the process; its kinds are explained in `template_worker.py`."""

    kind: str
    text: str


class ChatTemplate:
    """A Jinja template; its process starts with the first rendering and ends with this object.

    Any thread may render; one waits for the other.

    Args:
        source: the template.
        name: file of the template, for messages.

    Raises:
        CheckpointError: the source is not a valid template.
    """

    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._name = name
        self._worker: _Worker | None = None
        self._lock = threading.Lock()  # of the process
        self._is_tried = False
        self._fault = ""
        if len(source) > _MAX_CHARS:
            raise CheckpointError(f"{name}: chat template: more than {_MAX_CHARS:,} characters")
        try:
            _parse(source)
        except TemplateSyntaxError as error:
            fault = f"{name}: chat template, line {error.lineno}: {error.message}"
            raise CheckpointError(fault) from None
        except (RecursionError, ValueError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise CheckpointError(f"{name}: chat template: {reason}") from None

    def check(self, probes: list[dict[str, Any]]) -> None:
        """Render several sets of variables until one succeeds.

        Raises:
            CheckpointError: all fail; the reason is that of the first.
        """
        reason = ""
        for variables in probes:
            reply = self._ask(variables)
            if reply.kind == "text":
                self._is_tried = True
                return
            reason = reason or " ".join(reply.text.split())
            if reply.kind in _TEMPLATE_FAULTS:
                self._is_tried = True
                self._fault = reply.text
                break
        raise CheckpointError(f"{self._name}: chat template: {reason}")

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered template; the variables must be JSON values.

        Raises:
            RequestError: the template refuses the variables, or exceeds a limit with them.
            CheckpointError: the template is damaged, or exceeds a limit with a simple question.
        """
        if not self._is_tried:
            reply = self._ask(variables | _QUESTION)
            self._is_tried = True
            if reply.kind in _TEMPLATE_FAULTS:
                self._fault = reply.text
        if self._fault:  # so that a batch does not run into the time limit at every row
            raise CheckpointError(f"{self._name}: chat template: {self._fault}")
        reply = self._ask(variables)
        if reply.kind == "exceeded":
            raise RequestError(f"{self._name}: chat template: with these messages, {reply.text}")
        if reply.kind != "text":
            reason = " ".join(reply.text.split())
            raise RequestError(f"the chat template refuses these messages: {reason}")
        return reply.text

    def _ask(self, variables: dict[str, Any]) -> _Reply:
        """Return the process's reply.

        Raises:
            CheckpointError: the process cannot be started, or was ended from outside.
        """
        try:
            line = json.dumps(variables).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages must be made of JSON values: {error}") from None
        with self._lock:
            if self._worker is None or self._worker.is_closed:
                fault = f"{self._name}: no process for the chat template"
                with os_errors_as(CheckpointError, fault):
                    self._worker = _Worker(self._source)
            answer = self._worker.answer(line)
        if answer is None:
            raise CheckpointError(f"{self._name}: the process of the chat template was ended")
        return answer


def _parse(source: str) -> None:
    """Parse a template, which evaluates nothing, unlike compilation.

    Nesting may reach the limit of recursion; a garbage collection there would run finalizers of
    unrelated objects, which would fail.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        make_environment().parse(source)
    finally:
        if was_enabled:
            gc.enable()


class _Worker:
    """The process of a template; signals to a terminal's foreground group do not reach it."""

    def __init__(self, source: str) -> None:
        self._link, worker_end = socket.socketpair()
        self._link.settimeout(_WAIT_SECONDS)
        self._replies = self._link.makefile("rb")
        with worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _WORKER],
                stdin=worker_end.fileno(),
                stdout=worker_end.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        # Runs also when this object is garbage-collected, and before the interpreter exits.
        self._close = weakref.finalize(self, _end, self._process, self._link, self._replies)
        self._unsent = json.dumps(source).encode() + b"\n"

    @property
    def is_closed(self) -> bool:
        """True if the process has ended."""
        return not self._close.alive

    def answer(self, line: bytes) -> _Reply | None:
        """Send a line to the process and return its reply; end the process if none is in time.

        Returns:
            the reply; None if the process was ended from outside.
        """
        reply = b""
        try:
            with suppress(OSError):  # the process has ended, or the reply is too late
                self._link.sendall(self._unsent + line)
                self._unsent = b""
                reply = self._replies.readline()
        finally:  # after an interruption, a late reply must not be taken for the next one
            if not reply.endswith(b"\n"):
                self._close()
        if reply.endswith(b"\n"):
            ((kind, text),) = json.loads(reply).items()
            return _Reply(kind, text)
        if self._process.returncode == -signal.SIGXCPU:
            return _Reply("exceeded", f"no end within {CPU_SECONDS} seconds of processor time")
        return None


def _end(process: "subprocess.Popen[bytes]", link: socket.socket, replies: BufferedReader) -> None:
    """End the process; if it has already ended, its exit code is kept."""
    replies.close()
    link.close()
    process.kill()
    process.wait()
