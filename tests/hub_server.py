"""A hub on loopback: serves directories as the Hugging Face hub serves repositories."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_CHUNK = 1 << 16


@dataclass
class Hub:
    """The contents of a test hub, its failures, and its requests.

    Attributes:
        folders: the directory of each repository.
        commit: of every repository, on branch `main`.
        status: every request is answered with this error, with `error_code` if given.
        cut_at: bytes of a weight file after which connections end, for `num_cuts` of them.
        seconds: between two pieces of 64 KiB of a weight file.
        is_gated: files are refused, the repositories' descriptions are not.
        ranges: parts of files are sent when asked for.
        sent: bytes of bodies, by file.
        begins: where the last request for a file's content began.
        asked: method and path of every request.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    commit: str = COMMIT
    status: int = 0
    error_code: str = ""
    cut_at: int = 0
    num_cuts: int = 0
    seconds: float = 0.0
    is_gated: bool = False
    ranges: bool = True
    sent: dict[str, int] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        """Serve on a free port."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of a program that is to use this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status:
            return self.refuse(self.hub.status, self.hub.error_code)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path):
            return self.describe(*found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*found.groups())
        return self.refuse(404, "")

    def describe(self, repository: str, kind: str | None, revision: str | None) -> None:
        folder = self.hub.folders.get(repository)
        if folder is None:
            return self.refuse(401, "RepoNotFound")
        if revision not in (None, "main", self.hub.commit):
            return self.refuse(404, "RevisionNotFound")
        if kind == "tree":
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return self.answer([_entry(path, folder) for path in files])
        return self.answer({"id": repository, "sha": self.hub.commit, "siblings": []})

    def send_file(self, repository: str, revision: str, name: str) -> None:
        folder = self.hub.folders.get(repository)
        if folder is None or not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound" if folder else "RepoNotFound")
        if self.hub.is_gated:
            return self.refuse(401, "GatedRepo")
        data = (folder / name).read_bytes()
        begin, part = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if part and self.hub.ranges:
            begin = int(part[1])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{_etag(folder / name)}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if self.command == "GET":
            self.hub.begins[name] = begin
            self.send_body(name, data[begin:])
        return None

    def send_body(self, name: str, data: bytes) -> None:
        is_weights = name.endswith(".safetensors")
        cuts = is_weights and self.hub.num_cuts > 0
        for start in range(0, len(data), _CHUNK):
            if cuts and start >= self.hub.cut_at:
                self.hub.num_cuts -= 1
                self.close_connection = True
                return
            piece = data[start : start + _CHUNK]
            try:
                self.wfile.write(piece)
            except OSError:  # the program was killed
                self.close_connection = True
                return
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(piece)
            time.sleep(self.hub.seconds if is_weights else 0.0)

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    size, name = path.stat().st_size, str(path.relative_to(folder))
    entry = {"type": "file", "path": name, "size": size, "oid": _etag(path)[:40]}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": _etag(path), "size": size, "pointerSize": 134}
    return entry


def _etag(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest if path.suffix == ".safetensors" else digest[:40]
