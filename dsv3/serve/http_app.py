"""The HTTP application of a server: its endpoints, its key, its limits, its errors."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv3.engine.engine import Engine
from dsv3.errors import describe_error, shorten
from dsv3.serve.answers import HttpError
from dsv3.serve.exporter import CacheCollector, MetricsCollector
from dsv3.serve.front import Front, Status
from dsv3.serve.jobs import (
    BodyMaker,
    JobMaker,
    anthropic_job,
    count_tokens,
    detokenize,
    openai_job,
    tokenize,
)
from dsv3.serve.responses import CLIENT_GONE, AnswerResponse, retry_header, unless_gone
from dsv3.text.anthropic_answer import anthropic_error
from dsv3.text.anthropic_format import COUNT_TOKENS, MESSAGES
from dsv3.text.openai_answer import error_body
from dsv3.text.openai_format import CHAT, COMPLETIONS
from dsv3.version import __version__

log = logging.getLogger(__name__)

_OPEN_PATHS = ("/", "/health")  # need no key: the page asks for it
# The page talks to this server alone, and no other page may frame it.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def make_app(front: Front, keys: Sequence[str] = (), origins: Sequence[str] = ()) -> ASGIApp:
    """Return the application.

    Args:
        front: passes requests to the engine.
        keys: clients must send one of them; without any, all clients are served.
        origins: web pages of these origins may use the server; "*" is all.
    """
    jobs = {CHAT: openai_job(CHAT), COMPLETIONS: openai_job(COMPLETIONS), MESSAGES: anthropic_job}
    bodies = {COUNT_TOKENS: count_tokens, "/tokenize": tokenize, "/detokenize": detokenize}
    post: list[tuple[str, Handler]] = [
        *((url, partial(_answer, front, make)) for url, make in jobs.items()),
        *((url, partial(_reply, front, make)) for url, make in bodies.items()),
    ]
    get: list[tuple[str, Handler]] = [
        ("/", _page),
        ("/health", partial(_health, front)),
        ("/version", _version),
        ("/v1/models", partial(_models, front)),
        ("/v1/models/{name:path}", partial(_model, front)),
        ("/tokenizer_info", partial(_tokenizer_info, front)),
        ("/metrics", partial(_metrics, front)),
    ]
    routes = [Route(path, handler, methods=["POST"]) for path, handler in post]
    routes += [Route(path, handler, methods=["GET"]) for path, handler in get]
    middleware = [Middleware(_KeyCheck, keys=keys)]
    if origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = {
        HttpError: _http_error,
        HTTPException: _starlette_error,
        ClientDisconnect: _client_gone,
        Exception: _internal_error,
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    return partial(_reported, app)


async def _reported(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application, and log its errors in one line, as uvicorn does not."""
    try:
        await app(scope, receive, send)
    except asyncio.CancelledError:  # the server has ended, and this connection was slow to
        log.info("%s: cut off", shorten(scope.get("path", "")))
    except Exception as error:
        log.error("%s 500: %s", shorten(scope.get("path", "")), describe_error(error))
        log.debug("%s", scope.get("path"), exc_info=error)


class _KeyCheck:
    """Refuses requests without one of the keys, sent as OpenAI's or Anthropic's clients do."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        message = "this server needs a key: Authorization: Bearer KEY, or x-api-key: KEY"
        response = JSONResponse(_error(scope["path"], message, 401, "invalid_api_key"), 401)
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        sent = [bearer.strip() if scheme.lower() == b"bearer" else b""]
        sent.append(headers.get(b"x-api-key", b""))
        # All of them are compared, each in constant time.
        found = [hmac.compare_digest(key, one) for key in self._keys for one in sent]
        return not self._keys or any(found)


async def _answer(front: Front, make: JobMaker, request: Request) -> Response:
    begin = time.monotonic()
    job = await _prepared(front, make, request)
    return AnswerResponse(front, job, begin)


async def _reply(front: Front, make: BodyMaker, request: Request) -> Response:
    return JSONResponse(await _prepared(front, make, request))


async def _prepared(front: Front, make: Callable[[Front, Engine, bytes], T], request: Request) -> T:
    """Return the result of `make` for the body of a request."""
    with front.preparing():
        raw = await _body(request, front.limits.max_body_bytes)
        job = front.encoded(partial(make, front, front.engine, raw))
        return await unless_gone(job, request.receive)


async def _body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        HttpError: it is too long, or not JSON by its headers. A web page may send other types, or
            none, to any server without asking.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind.lower() != "application/json":
        raise HttpError("the body must have Content-Type: application/json", 415)
    too_long = HttpError(f"the body is longer than {limit} bytes", 413)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_long
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
    return b"".join(parts)


async def _page(request: Request) -> Response:
    html = resources.files("dsv3.serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Content-Security-Policy": _PAGE_POLICY})


async def _health(front: Front, request: Request) -> Response:
    running, waiting = front.counts()
    state = {"status": front.status.value, "running": running, "waiting": waiting}
    if front.reason:
        state["error"] = front.reason
    return JSONResponse(state, 200 if front.status is Status.READY else 503)


async def _version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _models(front: Front, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_entry(front)]})


async def _model(front: Front, request: Request) -> Response:
    name = request.path_params["name"]
    if not name:  # "/v1/models/"
        return await _models(front, request)
    front.check_model(name)
    return JSONResponse(_model_entry(front))


def _model_entry(front: Front) -> dict[str, Any]:
    return {
        "id": front.served.model,
        "object": "model",
        "created": front.created,
        "owned_by": "dsv3",
        "max_model_len": front.loaded_engine.max_seq_len,
        "vocab_size": front.loaded_engine.vocab_size,
    }


async def _tokenizer_info(front: Front, request: Request) -> Response:
    """Return what a client needs to tokenize with the server, in vLLM's form."""
    tokenizer = front.engine.tokenizer
    if tokenizer is None:
        raise HttpError("this checkpoint has no tokenizer", 404)
    return JSONResponse(tokenizer.special_tokens | {"chat_template": tokenizer.chat_template})


async def _metrics(front: Front, request: Request) -> Response:
    registry = CollectorRegistry(auto_describe=False)
    engine = front.loaded_engine
    registry.register(MetricsCollector(engine.metrics))
    registry.register(CacheCollector(engine.page_states, front.layout))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _error(path: str, message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error in the format of an endpoint."""
    is_anthropic = path in (MESSAGES, COUNT_TOKENS)
    return anthropic_error(message, status) if is_anthropic else error_body(message, status, code)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    path = shorten(request.url.path)
    log.info("%s %d: %s", path, error.status, error.message)
    body = _error(path, error.message, error.status, error.code)
    return JSONResponse(body, error.status, retry_header(error))


async def _starlette_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = shorten(request.url.path)
    body = _error(path, f"{shorten(request.method)} {path}: {error.detail}", error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    log.info("%s %d: the client disconnected", request.url.path, CLIENT_GONE)
    return Response(status_code=CLIENT_GONE)


async def _internal_error(request: Request, error: Exception) -> Response:
    message = f"internal error: {describe_error(error)}"
    return JSONResponse(_error(request.url.path, message, 500), 500)
