"""Who may use a server: every endpoint and method, with and without a key, from other pages."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.programs import HANG_SECONDS
from tests.server import CHAT, QUESTION, Server

pytestmark = pytest.mark.slow
KEY, PAGE, OTHER_PAGE = "right-key", "https://page.example", "https://other.example"
LIMIT = {"max_tokens": 1}
# Endpoint -> its method, and a body that it answers with 200.
PROTECTED: dict[str, tuple[str, Any]] = {
    CHAT: ("POST", {"messages": QUESTION} | LIMIT),
    "/v1/completions": ("POST", {"prompt": "a"} | LIMIT),
    "/v1/messages": ("POST", {"messages": QUESTION} | LIMIT),
    "/v1/messages/count_tokens": ("POST", {"messages": QUESTION}),
    "/tokenize": ("POST", {"prompt": "a"}),
    "/detokenize": ("POST", {"tokens": [5]}),
    "/v1/models": ("GET", None),
    "/v1/models/": ("GET", None),
    "/v1/models/demo-v3": ("GET", None),
    "/tokenizer_info": ("GET", None),
    "/metrics": ("GET", None),
    "/version": ("GET", None),
}
OPEN = ("/", "/health")
UNKNOWN = ("/x", "/v1", "/health/", "//health", "/Health", "/docs", "/../health")
NO_KEY: dict[str, dict[str, str]] = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong-key"},
    "begin": {"Authorization": f"Bearer {KEY[:-1]}"},
    "longer": {"Authorization": f"Bearer {KEY}x"},
    "empty": {"Authorization": "Bearer "},
    "scheme": {"Authorization": f"Basic {KEY}"},
    "bare": {"Authorization": KEY},
    "wrong header": {"x-api-key": "wrong-key"},
    "empty header": {"x-api-key": ""},
    "cookie": {"Cookie": f"key={KEY}"},
}
WITH_KEY: dict[str, dict[str, str]] = {
    "bearer": {"Authorization": f"Bearer {KEY}"},
    "lower case": {"authorization": f"bearer  {KEY} "},
    "anthropic": {"x-api-key": KEY},
    "one of both": {"x-api-key": KEY, "Authorization": "Bearer wrong-key"},
    "second key": {"Authorization": "Bearer second-key"},
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\nsecond-key\n")
    keys.chmod(0o600)
    with Server("--api-key-file", str(keys), "--cors", PAGE, ranks=1) as started:
        yield started
        assert "Traceback" not in started.log
        assert KEY not in started.log


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server without a key and without --cors."""
    with Server(ranks=1) as started:
        yield started
        assert "Traceback" not in started.log


def ask(
    server: Server, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Return the status, the headers by their names in lower case, and the body."""
    connection = server.connect()
    data = None if body is None else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        given["Content-Type"] = "application/json"
    connection.request(method, path, data, given)
    response = connection.getresponse()
    found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return found


@pytest.mark.parametrize("name", [*NO_KEY, *WITH_KEY])
def test_only_the_page_and_the_health_are_open(server: Server, name: str) -> None:
    headers = (NO_KEY | WITH_KEY)[name]
    for path, (method, body) in PROTECTED.items():
        status, _, answer = ask(server, method, path, body, **headers)
        assert status == (200 if name in WITH_KEY else 401), (path, answer)
        if name in NO_KEY:
            error = json.loads(answer)["error"]
            assert "key" in error["message"] and error["type"] == "authentication_error"
    for path in OPEN:
        assert ask(server, "GET", path, **headers)[0] == 200, path
    for path in UNKNOWN:
        wanted = (404, 307) if name in WITH_KEY else (401,)
        assert ask(server, "GET", path, **headers)[0] in wanted, path


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_every_endpoint(server: Server, method: str) -> None:
    """A known method is answered; others are not allowed, by name, and need the key as well."""
    known = {path: {way, "HEAD"} if way == "GET" else {way} for path, (way, _) in PROTECTED.items()}
    known |= {path: {"GET", "HEAD"} for path in OPEN}
    for path, methods in known.items():
        status, headers, answer = ask(server, method, path, **WITH_KEY["bearer"])
        if method == "PROPFIND" and status == 400:  # uvicorn's parser may not know it
            continue
        if method in methods:
            assert status == (415 if method == "POST" else 200), (path, answer)
        else:
            assert status == 405 and set(headers["allow"].split(", ")) == methods, (path, answer)
        if method == "HEAD":
            assert not answer
        without = ask(server, method, path)[0]
        assert without == (status if path in OPEN else 401), path


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
}


def test_scripts_of_a_page_that_is_named_may_ask(server: Server) -> None:
    for path, (method, body) in PROTECTED.items():
        status, headers, _ = ask(server, "OPTIONS", path, Origin=PAGE, **PREFLIGHT)
        assert (status, headers["access-control-allow-origin"]) == (200, PAGE), path
        assert "POST" in headers["access-control-allow-methods"]
        assert "authorization" in headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in headers
        for key, want in ((WITH_KEY["bearer"], 200), ({}, 401)):
            status, headers, _ = ask(server, method, path, body, Origin=PAGE, **key)
            assert (status, headers["access-control-allow-origin"]) == (want, PAGE), path


def check_scripts_may_not(server: Server, page: str, preflight: int, answer: int) -> None:
    """Check the statuses of every endpoint for a page's scripts, and that no page is allowed."""
    for path, (method, body) in PROTECTED.items():
        status, headers, _ = ask(server, "OPTIONS", path, Origin=page, **PREFLIGHT)
        assert status == preflight and "access-control-allow-origin" not in headers, path
        status, headers, _ = ask(server, method, path, body, Origin=page)
        assert status == answer and "access-control-allow-origin" not in headers, path


def test_scripts_of_other_pages_may_not(server: Server) -> None:
    check_scripts_may_not(server, OTHER_PAGE, preflight=400, answer=401)


def test_without_cors_no_page_but_ours_may(plain: Server) -> None:
    check_scripts_may_not(plain, PAGE, preflight=405, answer=200)
    for path, (method, body) in PROTECTED.items():
        if method == "POST":  # what a page may send without asking
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                connection = plain.connect()
                connection.request("POST", path, json.dumps(body), {"Content-Type": kind})
                assert connection.getresponse().status == 415, (path, kind)
                connection.close()


def test_a_web_socket_needs_the_key_too(server: Server) -> None:
    lines = ["GET /v1/models HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "", "")
    with socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as sock:
        sock.sendall("\r\n".join(lines).encode())
        assert int(sock.recv(4096).split()[1]) in (401, 403)
