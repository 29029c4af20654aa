"""Serves an engine's metrics over HTTP, for Prometheus to fetch."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from dsv3.engine.metrics import Metrics
from dsv3.errors import ConfigError


@contextmanager
def serve_metrics(metrics: Metrics, port: int) -> Iterator[int]:
    """Answer GET /metrics from a thread of its own, as long as the context lasts.

    Args:
        metrics: what to tell.
        port: where to listen; 0 takes any free port.

    Yields:
        the port.

    Raises:
        ConfigError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer."""
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = metrics.prometheus().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each request."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port={port} cannot be listened on: {error}") from error
    with server:
        Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
