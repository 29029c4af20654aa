"""Rendezvous of the ranks: who they are, how they were started, and a connection of each to rank 0.

The launcher names rank 0's host and a store, nothing more. Rank 0 leaves a port and a token in the
store. Every other rank connects there and says hello: the token, its peer record and the settings
that must be the same on all ranks. When all have come, rank 0 answers with the roster, or with the
reason why there is none. The connections stay: the system closes them the moment a rank dies, on
whatever host, which no store tells. A port that an attempt before a restart has left in the store
does no harm: nobody answers there, or somebody who does not know the token.
"""

import json
import logging
import os
import selectors
import socket
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from dsv3.errors import ConfigError, Dsv3Error, RankError
from dsv3.parallel.launcher import environment_local_rank, meeting_point

log = logging.getLogger(__name__)

_HINT_SECONDS, _AGAIN_SECONDS = 5.0, 60.0  # until a message says who is missing, and says it again
_HELLO_SECONDS = 5.0  # for a connection to say hello
_LATER_SECONDS = 5.0  # that the other ranks wait longer than rank 0, which knows who is missing
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
    """

    peer: Peer
    world_size: int
    settings: Mapping[str, str] = field(default_factory=dict)

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
        ConfigError: on every rank, the ranks were started in different ways.
        RankError: a rank has not come in time, or has come and died.
    """
    rank = hello.peer.rank
    patience = _Patience(hello.world_size, timeout if rank == 0 else timeout + _LATER_SECONDS)
    store = _open_store(patience, rank)
    if rank:
        return _join(store, hello, patience)
    return _Invitation(store, hello, patience).roster()


class _Patience:
    """Waits a moment, says now and then for whom, and gives up at last."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self.place = str(meeting_point())
        self._world_size, self._start = world_size, time.monotonic()
        self._say_at = self._start + _HINT_SECONDS
        self._give_up_at = self._start + timeout

    @property
    def seconds_left(self) -> float:
        """Seconds until this rank gives up."""
        return max(0.1, self._give_up_at - time.monotonic())

    def end_soon(self) -> None:
        """Give up in a moment."""
        self._give_up_at = min(self._give_up_at, time.monotonic() + _LATER_SECONDS)

    def check(self, here: Collection[int] | None = None) -> None:
        """Say which ranks are not here, or that rank 0 is not; raise if it is time to give up."""
        now = time.monotonic()
        text = f"no answer at {self.place} yet; is rank 0 running on that host?"
        if here is not None:
            missing = sorted(set(range(self._world_size)) - set(here))
            text = (
                f"waiting at {self.place} for {len(missing)} of {self._world_size} ranks "
                f"({', '.join(map(str, missing))}); was the program started on every host?"
            )
        if now > self._give_up_at:
            raise RankError(
                f"gave up after {now - self._start:.0f} s: {text} "
                "(a longer --rank-timeout waits longer)"
            )
        if now > self._say_at:
            self._say_at += _AGAIN_SECONDS
            if environment_local_rank() == 0:
                log.warning("%s", text)

    def wait(self) -> None:
        """Wait a moment for rank 0."""
        self.check()
        time.sleep(0.1)


def _open_store(patience: _Patience, rank: int) -> dist.Store:
    """Connect to torchrun's store; without torchrun, rank 0 holds one."""
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    seconds, place = timedelta(seconds=_HINT_SECONDS), meeting_point()
    while True:
        try:
            return dist.TCPStore(
                place.host,
                place.port,
                None,
                is_server,
                seconds,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError:
            patience.wait()


class _Invitation:
    """Rank 0's side: takes a connection from every other rank, then answers all of them."""

    def __init__(self, store: dist.Store, hello: Hello, patience: _Patience) -> None:
        self._store, self._hello, self._patience = store, hello, patience
        self._token = uuid.uuid4().hex
        self._hellos = {0: hello}
        self._links: dict[int, socket.socket] = {}
        self._refused: list[socket.socket] = []
        self._unread: dict[socket.socket, bytes] = {}  # of connections without a hello
        self._silent_since: dict[socket.socket, float] = {}
        self._refusal: str | None = None

    def roster(self) -> Roster:
        """Wait for all ranks."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with (
            socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(server, selectors.EVENT_READ)
            self._store.set(_ADDRESS, f"{server.getsockname()[1]} {self._token}")
            with self._answer_failures():
                while len(self._links) < self._hello.world_size - 1:
                    for key, _ in selector.select(0.1):
                        self._take(selector, server, key.fileobj)
                    self._drop_silent(selector)
                    self._check_links()
                    self._check_patience()
                if self._refusal is not None:
                    raise ConfigError(self._refusal)
        peers = [self._hellos[rank].peer for rank in range(self._hello.world_size)]
        name = uuid.uuid4().hex
        self._answer({"name": name, "peers": [asdict(peer) for peer in peers]})
        return Roster(peers, dist.PrefixStore(name, self._store), self._links)

    def _check_patience(self) -> None:
        """Give up if ranks are missing for too long: then the known reason is told first."""
        try:
            self._patience.check(self._hellos)
        except RankError:
            if self._refusal is not None:
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
        found = differences(self._hello, hello)
        if found and self._refusal is None:
            self._refusal = f"the ranks were started in different ways: {found}"
            self._patience.end_soon()

    def _check_links(self) -> None:
        for rank, link in self._links.items():
            if _is_closed(link):
                raise RankError(f"{self._hellos[rank].peer} has died during rendezvous")

    def _answer(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        for link in (*self._links.values(), *self._refused):
            link.settimeout(_HELLO_SECONDS)
            with suppress(OSError):  # the watch notices ranks that have died meanwhile
                link.sendall(line)


def differences(first: Hello, second: Hello) -> str:
    """Return in words which settings two ranks do not share; empty if they share all."""
    pairs = [("WORLD_SIZE", str(first.world_size), str(second.world_size))]
    for name in dict.fromkeys((*first.settings, *second.settings)):
        mine, other = (each.settings.get(name, "not known") for each in (first, second))
        pairs.append((name, mine, other))
    return "; ".join(
        f"{name} is {mine or 'empty'} on {first.peer} and {other or 'empty'} on {second.peer}"
        for name, mine, other in pairs
        if mine != other
    )


def _join(store: dist.Store, hello: Hello, patience: _Patience) -> Roster:
    """Connect to rank 0 and wait until it has heard of all ranks."""
    while True:
        if store.check([_ADDRESS]):
            answer, link = None, None
            with suppress(OSError, ValueError):
                port, token = store.get(_ADDRESS).decode().split()
                place = meeting_point().host, int(port)
                link = socket.create_connection(place, timeout=_HELLO_SECONDS)
                link.sendall(hello.line(token))
                line = _read_line(link, patience.seconds_left)
                patience.end_soon()  # without a whole line, rank 0 has died
                answer = json.loads(line)
            if isinstance(answer, dict) and link is not None:
                return _roster(answer, store, link)
        patience.wait()


def _roster(answer: dict[str, Any], store: dist.Store, link: socket.socket) -> Roster:
    """Return what rank 0 has answered; raise what it has met with."""
    if "error" in answer:
        error = (ConfigError if answer["is_config"] else RankError)(answer["error"])
        error.is_shared = error.told_elsewhere = True
        raise error
    peers = [Peer(**peer) for peer in answer["peers"]]
    return Roster(peers, dist.PrefixStore(answer["name"], store), {0: link})


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
