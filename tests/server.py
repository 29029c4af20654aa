"""Runs launch/serve.py with the demo model, and talks to it as a client does."""

import contextlib
import http.client
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from tests.programs import ALONE, HANG_SECONDS, ROOT, end, environment, free_port, torchrun

SERVE = str(ROOT / "launch" / "serve.py")
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is MLA?"}]


class Server:
    """A server."""

    def __init__(self, *flags: str, ranks: int = 2) -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the server)
        launch = ALONE if ranks == 1 else torchrun(ranks)
        command = [*launch, SERVE, "--port", str(self.port), *flags]
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=environment(), cwd=ROOT
        )

    def __enter__(self) -> Self:
        self.wait_until(lambda: self.health()[0] == 200)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(HANG_SECONDS)
        end(self.process)  # type: ignore[arg-type]
        self._log.close()

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def wait_until(self, holds: Any) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if holds():
                    return
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Return the status and the text of a response."""
        connection = self.connect()
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None else {}
        given |= headers or {}
        connection.request(method, path, data, given)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def post(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        status, text = self.send("POST", path, body, headers=headers)
        return status, json.loads(text)

    def health(self) -> tuple[int, dict[str, Any]]:
        status, text = self.send("GET", "/health")
        return status, json.loads(text)

    def metric(self, name: str) -> float:
        for line in self.send("GET", "/metrics")[1].splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream; dropping the iterator closes the connection."""
        connection = self.connect()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body | {"stream": True}).encode(), headers)
        response = connection.getresponse()
        try:
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            response.close()
            connection.close()
