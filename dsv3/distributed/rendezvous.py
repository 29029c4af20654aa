"""Rendezvous of the ranks: a roster of all ranks, and a connection of each rank to rank 0.

The launcher provides the address of a store only. Rank 0 writes a port and a token to the store.
Every other rank connects to the port and sends a hello: the token, its peer record and the settings
that must be the same on all ranks. A rank that cannot start sends the reason. When all ranks have
connected, rank 0 answers with the roster, or with the reason why the job cannot start. The
connections stay open: the operating system closes them when a rank dies, on any host, which a store
does not report. A stale port from an attempt before a restart does no harm: nothing answers there,
or a program that does not know the token.
"""

import json
import os
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from dsv3.distributed.launcher import rendezvous_address
from dsv3.distributed.store import EXTRA_SECONDS, Backoff, open_store
from dsv3.errors import ConfigError, Dsv3Error, RankError

_HELLO_SECONDS = 5.0  # for a new connection to send its hello
_MAX_HELLO = 1 << 20  # bytes
_ADDRESS = "dsv3/address of rank 0"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Peer:
    """Record of a rank.

    Attributes:
        rank: of the world.
        host: host name.
        boot: boot id, the same for all processes of a running operating system.
        pid: process id.
        gpus: its CUDA_VISIBLE_DEVICES; empty for all devices.
    """

    rank: int
    host: str
    boot: str
    pid: int
    gpus: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """Return the record of this process."""
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"{uuid.getnode():x}"
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return cls(rank, socket.gethostname(), boot, os.getpid(), gpus)


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank's first message.

    Attributes:
        peer: the rank.
        world_size: the number of ranks it expects.
        settings: names and values that must be the same on all ranks.
        failure: the reason if the rank cannot start; else empty.
    """

    peer: Peer
    world_size: int
    settings: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""

    def line(self, token: str) -> bytes:
        """Return the message as a line of JSON."""
        return json.dumps({"token": token, **asdict(self)}).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes, token: str) -> "Hello | None":
        """Return the message in a line; None if it is not from a rank of this job."""
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            data = json.loads(line)
            if data.pop("token") == token:
                data["peer"] = Peer(**data["peer"])
                return cls(**data)
        return None


class Roster(NamedTuple):
    """Result of the rendezvous.

    Attributes:
        peers: all ranks, in order.
        store: a part of the store that no other attempt uses.
        links: this rank's connections: to every other rank on rank 0, to rank 0 on the others.
    """

    peers: Sequence[Peer]
    store: dist.Store
    links: Mapping[int, socket.socket]


def gather_roster(hello: Hello, timeout: float) -> Roster:
    """Wait for all ranks and return the roster.

    Args:
        hello: this rank's message.
        timeout: seconds after which rank 0 gives up waiting.

    Raises:
        ConfigError: on every rank, the ranks were started in different ways, or one cannot start.
        RankError: a rank has not connected in time, or has connected and died.
    """
    rank = hello.peer.rank
    seconds = timeout if rank == 0 else timeout + EXTRA_SECONDS
    backoff = Backoff(rank, hello.world_size, seconds)
    roster: Future[Roster] = Future()

    def run() -> None:
        try:
            roster.set_result(_make_roster(hello, backoff))
        except BaseException as error:
            roster.set_exception(error)

    # In a thread, because connecting to the store may never return.
    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        return roster.result(timeout + 2 * EXTRA_SECONDS)
    except TimeoutError:
        # Not raised: the interpreter aborts at exit if the thread is still within the store.
        os.write(2, f"error: {backoff.error()}\n".encode())
        os._exit(RankError.exit_code)


def _make_roster(hello: Hello, backoff: Backoff) -> Roster:
    """Join the roster, on rank 0 as its server; connect again if the store's process ends."""
    while True:
        store = open_store(backoff)
        with suppress(dist.DistNetworkError):
            if hello.peer.rank:
                return _join_roster(store, hello, backoff)
            return _RosterServer(store, hello, backoff).roster()
        backoff.end_soon()
        backoff.wait()


class _RosterServer:
    """Rank 0's side: accepts a connection from every other rank, then answers all of them."""

    def __init__(self, store: dist.Store, hello: Hello, backoff: Backoff) -> None:
        self._store = store
        self._hello = hello
        self._backoff = backoff
        self._token = uuid.uuid4().hex
        self._hellos = {0: hello}
        self._links: dict[int, socket.socket] = {}
        self._refused: list[socket.socket] = []
        # Connections that have not sent a hello: bytes received, and time of connection.
        self._unread: dict[socket.socket, bytes] = {}
        self._connected_at: dict[socket.socket, float] = {}
        # The first reason why the job cannot start.
        self._refusal = hello.failure
        if hello.failure:
            backoff.end_soon()

    def roster(self) -> Roster:
        """Wait for all ranks, answer them, and return the roster."""
        dualstack = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dualstack else socket.AF_INET
        with (
            socket.create_server(("", 0), family=family, dualstack_ipv6=dualstack) as server,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(server, selectors.EVENT_READ)
            self._publish(f"{server.getsockname()[1]} {self._token}")
            with self._answer_failures():
                while len(self._links) < self._hello.world_size - 1:
                    for key, _ in selector.select(0.1):
                        if key.fileobj is server:
                            self._accept(selector, server)
                        else:
                            self._receive(selector, key.fileobj)
                    self._drop_silent(selector)
                    self._check_others()
                if self._refusal:
                    raise ConfigError(self._refusal)
        peers = [self._hellos[rank].peer for rank in range(self._hello.world_size)]
        name = uuid.uuid4().hex
        self._answer({"name": name, "peers": [asdict(peer) for peer in peers]})
        return Roster(peers, dist.PrefixStore(name, self._store), self._links)

    def _publish(self, address: str) -> None:
        """Write the address to the store.

        Raises:
            ConfigError: another rank 0 answers at the address that is in the store.
        """
        previous = ""
        while True:
            stored = self._store.compare_set(_ADDRESS, previous, address).decode()
            if stored == address:
                return
            call = _send_hello(stored, self._hello, _HELLO_SECONDS)
            if call is not None and call.answer is not None:
                _check_answer(call.answer)
            previous = stored

    def _check_others(self) -> None:
        """Give up if a rank has died, or is missing for too long.

        Raises:
            ConfigError: the reason why the job cannot start, if it is known.
            RankError: otherwise.
        """
        try:
            for rank, link in self._links.items():
                if _is_closed(link):
                    raise RankError(f"{self._hellos[rank].peer} has died during rendezvous")
            self._backoff.check(self._hellos)
        except RankError:
            if self._refusal:
                raise ConfigError(self._refusal) from None
            raise

    @contextmanager
    def _answer_failures(self) -> Iterator[None]:
        """Send an error raised in the block to all ranks that have connected."""
        try:
            yield
        except Dsv3Error as error:
            self._answer({"error": str(error), "is_config": isinstance(error, ConfigError)})
            error.seen_by_all_ranks = True
            raise

    def _accept(self, selector: selectors.BaseSelector, server: socket.socket) -> None:
        """Accept a new connection."""
        link = server.accept()[0]
        link.setblocking(False)
        self._unread[link] = b""
        self._connected_at[link] = time.monotonic()
        selector.register(link, selectors.EVENT_READ)

    def _receive(self, selector: selectors.BaseSelector, link: Any) -> None:
        """Read from a connection that has not sent a hello; drop it unless it sends one."""
        with suppress(OSError):
            data = link.recv(1 << 16)
            line = self._unread[link] + data
            if data and not line.endswith(b"\n") and len(line) < _MAX_HELLO:
                self._unread[link] = line
                return
            hello = Hello.read(line, self._token)
            if hello is not None:
                self._forget(selector, link)
                self._admit(link, hello)
                return
        self._forget(selector, link)
        link.close()

    def _drop_silent(self, selector: selectors.BaseSelector) -> None:
        limit = time.monotonic() - _HELLO_SECONDS
        silent = [link for link, connected_at in self._connected_at.items() if connected_at < limit]
        for link in silent:
            self._forget(selector, link)
            link.close()

    def _forget(self, selector: selectors.BaseSelector, link: socket.socket) -> None:
        """Remove a connection from those without a hello."""
        selector.unregister(link)
        del self._unread[link]
        del self._connected_at[link]

    def _admit(self, link: socket.socket, hello: Hello) -> None:
        """Add a rank; record the reason if the job cannot start with it.

        Raises:
            ConfigError: there is no such rank, or it has connected already.
        """
        rank = hello.peer.rank
        world_size = self._hello.world_size
        link.setblocking(True)
        link.settimeout(_HELLO_SECONDS)
        if not 0 < rank < world_size or rank in self._links:
            self._refused.append(link)
            text = f"RANK must be below WORLD_SIZE={world_size}"
            if rank in self._hellos:
                text = f"the process {self._hellos[rank].peer.pid} is this rank already"
            raise ConfigError(f"{hello.peer} (process {hello.peer.pid}) cannot join: {text}")
        self._links[rank] = link
        self._hellos[rank] = hello
        if not self._refusal:
            self._refusal = reason_against(self._hello, hello)
            if self._refusal:
                self._backoff.end_soon()

    def _answer(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        for link in (*self._links.values(), *self._refused):
            link.settimeout(_HELLO_SECONDS)
            with suppress(OSError):  # the watchdog detects ranks that have died
                link.sendall(line)


def reason_against(first: Hello, second: Hello) -> str:
    """Return the reason why a job cannot start with these two ranks; empty if it can."""
    if second.failure:
        return f"{second.peer}: {second.failure}"
    pairs = [("WORLD_SIZE", str(first.world_size), str(second.world_size))]
    for name in dict.fromkeys((*first.settings, *second.settings)):
        unknown = "not known"
        pairs.append((name, first.settings.get(name, unknown), second.settings.get(name, unknown)))
    differences = "; ".join(
        f"{name} is {a or 'empty'} on {first.peer} and {b or 'empty'} on {second.peer}"
        for name, a, b in pairs
        if a != b
    )
    return f"the ranks were started in different ways: {differences}" if differences else ""


def _join_roster(store: dist.Store, hello: Hello, backoff: Backoff) -> Roster:
    """Connect to rank 0 and wait for the roster."""
    while True:
        if store.check([_ADDRESS]):
            address = store.get(_ADDRESS).decode()
            call = _send_hello(address, hello, backoff.seconds_left)
            if call is not None and call.answer is not None:
                _check_answer(call.answer)
                peers = [Peer(**peer) for peer in call.answer["peers"]]
                store = dist.PrefixStore(call.answer["name"], store)
                return Roster(peers, store, {0: call.link})
            if call is not None:  # rank 0 has died
                backoff.end_soon()
        backoff.wait()


class _Call(NamedTuple):
    """A connection to rank 0, and its answer; None if it was closed without an answer."""

    link: socket.socket
    answer: dict[str, Any] | None


def _send_hello(address: str, hello: Hello, seconds: float) -> _Call | None:
    """Send a hello to rank 0 and wait for its answer; None if nothing listens at the address.

    Args:
        address: port and token, as in the store.
        hello: the message.
        seconds: to wait for the answer.
    """
    with suppress(OSError, ValueError):
        port, token = address.split()
        host = rendezvous_address().host
        link = socket.create_connection((host, int(port)), timeout=_HELLO_SECONDS)
        with suppress(OSError, ValueError):
            link.sendall(hello.line(token))
            answer = json.loads(_read_line(link, seconds))
            if isinstance(answer, dict):
                return _Call(link, answer)
        return _Call(link, None)
    return None


def _check_answer(answer: Mapping[str, Any]) -> None:
    """Raise rank 0's error if the answer contains one."""
    if "error" in answer:
        error_type = ConfigError if answer["is_config"] else RankError
        error = error_type(answer["error"])
        error.seen_by_all_ranks = True
        error.reported_by_rank0 = True
        raise error


def _read_line(link: socket.socket, seconds: float) -> str:
    """Return one received line; incomplete or empty if the connection is closed before."""
    link.settimeout(seconds)
    data = b""
    while not data.endswith(b"\n"):
        received = link.recv(1 << 16)
        if not received:
            break
        data += received
    return data.decode()


def _is_closed(link: socket.socket) -> bool:
    link.settimeout(0)
    try:
        return not link.recv(1, socket.MSG_PEEK)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
