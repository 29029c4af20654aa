"""Rendezvous of the ranks: who they are, how they were started, and a connection of each to rank 0.

The launcher names rank 0's host and a store, nothing more. Rank 0 leaves a port and a token in the
store. Every other rank connects there and says hello: the token, its peer record and the settings
that must be the same on all ranks. When all have come, rank 0 answers with the roster, or with the
reason why there is none: also a rank that cannot start says hello, with its reason. The connections
stay: the system closes them the moment a rank dies, on whatever host, which no store tells. A port
that an attempt before a restart has left in the store does no harm: nothing answers there, or a
program that does not know the token.
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

from dsv3.distributed.launcher import meeting_point
from dsv3.distributed.store import LATER_SECONDS, Patience, open_store
from dsv3.errors import ConfigError, Dsv3Error, RankError

_HELLO_SECONDS = 5.0  # for a connection to say hello
_MAX_HELLO = 1 << 20  # bytes
_ADDRESS = "dsv3/address of rank 0"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Peer:
    """A rank as the others know it.

    Attributes:
        boot: the same for all processes of a running kernel.
        gpus: the devices it is allowed to see, empty for all.
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
        failure: why it cannot start, if so.
    """

    peer: Peer
    world_size: int
    settings: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""

    def line(self, token: str) -> bytes:
        """Return the message."""
        return json.dumps({"token": token, **asdict(self)}).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes, token: str) -> "Hello | None":
        """Return the message of a rank of this job; None for any other."""
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            data = json.loads(line)
            if data.pop("token") == token:
                data["peer"] = Peer(**data["peer"])
                return cls(**data)
        return None


class Roster(NamedTuple):
    """All ranks, a part of the store that no other attempt uses, and this rank's connections.

    Rank 0 has one to every other rank, these have one to rank 0.
    """

    peers: Sequence[Peer]
    store: dist.Store
    links: Mapping[int, socket.socket]


def meet(hello: Hello, timeout: float) -> Roster:
    """Wait for all ranks.

    Args:
        hello: this rank's.
        timeout: seconds after which rank 0 gives up waiting.

    Raises:
        ConfigError: on every rank, the ranks were started in different ways, or one cannot start.
        RankError: a rank has not come in time, or has come and died.
    """
    rank = hello.peer.rank
    seconds = timeout if rank == 0 else timeout + LATER_SECONDS
    patience = Patience(rank, hello.world_size, seconds)
    found: Future[Roster] = Future()

    def run() -> None:
        try:
            store = open_store(patience)
            if rank:
                found.set_result(_join(store, hello, patience))
            else:
                found.set_result(_Invitation(store, hello, patience).roster())
        except BaseException as error:
            found.set_exception(error)

    # Connecting to the store may take for ever.
    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        return found.result(timeout + 2 * LATER_SECONDS)
    except TimeoutError:
        # Not raised: the interpreter aborts at its end if that thread is still within the store.
        os.write(2, f"error: {patience.error()}\n".encode())
        os._exit(RankError.exit_code)


class _Invitation:
    """Rank 0's side: takes a connection from every other rank, then answers all of them."""

    def __init__(self, store: dist.Store, hello: Hello, patience: Patience) -> None:
        self._store, self._hello, self._patience = store, hello, patience
        self._token = uuid.uuid4().hex
        self._hellos = {0: hello}
        self._links: dict[int, socket.socket] = {}
        self._refused: list[socket.socket] = []
        self._unread: dict[socket.socket, bytes] = {}  # of connections without a hello
        self._silent_since: dict[socket.socket, float] = {}
        self._refusal = hello.failure
        if hello.failure:
            patience.end_soon()

    def roster(self) -> Roster:
        """Wait for all ranks."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with (
            socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(server, selectors.EVENT_READ)
            self._publish(f"{server.getsockname()[1]} {self._token}")
            with self._answer_failures():
                while len(self._links) < self._hello.world_size - 1:
                    for key, _ in selector.select(0.1):
                        self._take(selector, server, key.fileobj)
                    self._drop_silent(selector)
                    self._check_others()
                if self._refusal:
                    raise ConfigError(self._refusal)
        peers = [self._hellos[rank].peer for rank in range(self._hello.world_size)]
        name = uuid.uuid4().hex
        self._answer({"name": name, "peers": [asdict(peer) for peer in peers]})
        return Roster(peers, dist.PrefixStore(name, self._store), self._links)

    def _publish(self, address: str) -> None:
        """Leave the address in the store; if another rank 0 answers at the one there, raise."""
        before = ""
        while (found := self._store.compare_set(_ADDRESS, before, address).decode()) != address:
            call = _say_hello(found, self._hello, _HELLO_SECONDS)
            if call is not None and call.answer is not None:
                _check_answer(call.answer)
            before = found

    def _check_others(self) -> None:
        """Give up if a rank has died, or is missing for too long; a known reason is told first."""
        try:
            for rank, link in self._links.items():
                if _is_closed(link):
                    raise RankError(f"{self._hellos[rank].peer} has died during rendezvous")
            self._patience.check(self._hellos)
        except RankError:
            if self._refusal:
                raise ConfigError(self._refusal) from None
            raise

    @contextmanager
    def _answer_failures(self) -> Iterator[None]:
        """Tell the ranks that have come why the job does not start."""
        try:
            yield
        except Dsv3Error as error:
            self._answer({"error": str(error), "is_config": isinstance(error, ConfigError)})
            error.is_shared = True
            raise

    def _take(self, selector: selectors.BaseSelector, server: socket.socket, ready: Any) -> None:
        """Take a new connection, or the next bytes of one."""
        if ready is server:
            link = server.accept()[0]
            link.setblocking(False)
            self._unread[link], self._silent_since[link] = b"", time.monotonic()
            selector.register(link, selectors.EVENT_READ)
            return
        link = ready
        with suppress(OSError):
            data = link.recv(1 << 16)
            line = self._unread[link] + data
            if data and not line.endswith(b"\n") and len(line) < _MAX_HELLO:
                self._unread[link] = line
                return
            hello = Hello.read(line, self._token)
            if hello is not None:
                selector.unregister(link)
                del self._unread[link], self._silent_since[link]
                self._admit(link, hello)
                return
        self._drop(selector, link)  # others than ours may knock

    def _drop_silent(self, selector: selectors.BaseSelector) -> None:
        limit = time.monotonic() - _HELLO_SECONDS
        for link in [link for link, since in self._silent_since.items() if since < limit]:
            self._drop(selector, link)

    def _drop(self, selector: selectors.BaseSelector, link: socket.socket) -> None:
        selector.unregister(link)
        del self._unread[link], self._silent_since[link]
        link.close()

    def _admit(self, link: socket.socket, hello: Hello) -> None:
        """Add a rank; note why the job cannot start with it."""
        rank, world_size = hello.peer.rank, self._hello.world_size
        link.setblocking(True)
        link.settimeout(_HELLO_SECONDS)
        if not 0 < rank < world_size or rank in self._links:
            self._refused.append(link)
            text = f"RANK must be below WORLD_SIZE={world_size}"
            if rank in self._hellos:
                text = f"the process {self._hellos[rank].peer.pid} is this rank already"
            raise ConfigError(f"{hello.peer} (process {hello.peer.pid}) cannot join: {text}")
        self._links[rank], self._hellos[rank] = link, hello
        if not self._refusal:
            self._refusal = reason_against(self._hello, hello)
            if self._refusal:
                self._patience.end_soon()

    def _answer(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        for link in (*self._links.values(), *self._refused):
            link.settimeout(_HELLO_SECONDS)
            with suppress(OSError):  # the watch notices ranks that have died meanwhile
                link.sendall(line)


def reason_against(first: Hello, second: Hello) -> str:
    """Return why a job cannot start with these two ranks; empty if it can."""
    if second.failure:
        return f"{second.peer}: {second.failure}"
    pairs = [("WORLD_SIZE", str(first.world_size), str(second.world_size))]
    for name in dict.fromkeys((*first.settings, *second.settings)):
        mine, other = (each.settings.get(name, "not known") for each in (first, second))
        pairs.append((name, mine, other))
    found = "; ".join(
        f"{name} is {mine or 'empty'} on {first.peer} and {other or 'empty'} on {second.peer}"
        for name, mine, other in pairs
        if mine != other
    )
    return f"the ranks were started in different ways: {found}" if found else ""


def _join(store: dist.Store, hello: Hello, patience: Patience) -> Roster:
    """Connect to rank 0 and wait until it has heard of all ranks."""
    while True:
        if store.check([_ADDRESS]):
            address = store.get(_ADDRESS).decode()
            call = _say_hello(address, hello, patience.seconds_left)
            if call is not None and call.answer is not None:
                _check_answer(call.answer)
                peers = [Peer(**peer) for peer in call.answer["peers"]]
                store = dist.PrefixStore(call.answer["name"], store)
                return Roster(peers, store, {0: call.link})
            if call is not None:  # rank 0 has died
                patience.end_soon()
        patience.wait()


class _Call(NamedTuple):
    """A connection to rank 0 and its answer; None if it was closed without one."""

    link: socket.socket
    answer: dict[str, Any] | None


def _say_hello(address: str, hello: Hello, seconds: float) -> _Call | None:
    """Say hello to rank 0 and wait for its answer; None if nothing listens there."""
    with suppress(OSError, ValueError):
        port, token = address.split()
        place = meeting_point().host, int(port)
        link = socket.create_connection(place, timeout=_HELLO_SECONDS)
        with suppress(OSError, ValueError):
            link.sendall(hello.line(token))
            answer = json.loads(_read_line(link, seconds))
            if isinstance(answer, dict):
                return _Call(link, answer)
        return _Call(link, None)
    return None


def _check_answer(answer: Mapping[str, Any]) -> None:
    """Raise the error that rank 0 has met with, if it has."""
    if "error" in answer:
        error = (ConfigError if answer["is_config"] else RankError)(answer["error"])
        error.is_shared = error.told_elsewhere = True
        raise error


def _read_line(link: socket.socket, seconds: float) -> str:
    """Return the one line that the other side sends; empty if it does not."""
    link.settimeout(seconds)
    data = b""
    while not data.endswith(b"\n") and (more := link.recv(1 << 16)):
        data += more
    return data.decode()


def _is_closed(link: socket.socket) -> bool:
    link.settimeout(0)
    try:
        return not link.recv(1, socket.MSG_PEEK)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
