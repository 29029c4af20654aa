"""Where the ranks meet: who they are, on which hosts, and one connection of each to rank 0.

torchrun names rank 0's host and a store, nothing more. Rank 0 leaves a port there, all others
connect to it and tell who they are; it answers with the roster when all have come. The connections
stay: the system closes them the moment a rank dies, on whatever host, which no store tells. And a
port that an attempt before a restart has left in the store is of no harm: nobody answers there.
"""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from dsv3.errors import RankError

log = logging.getLogger(__name__)

_HINT_SECONDS, _AGAIN_SECONDS = 5.0, 60.0  # until we say who is missing, and say it again
_GIVE_UP_SECONDS = 600.0  # what torchrun waits for its own agents
_ANSWER_SECONDS = 5.0
_PORT = "dsv3/port of rank 0"
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


class Meeting(NamedTuple):
    """All ranks, a part of the store that no other attempt uses, and this rank's connections.

    Rank 0 has one to every other rank, these have one to rank 0.
    """

    peers: Sequence[Peer]
    store: dist.Store
    links: Mapping[int, socket.socket]


def meet(rank: int, world_size: int) -> Meeting:
    """Wait for all ranks.

    Raises:
        RankError: one has not come for ten minutes, or has come and died.
    """
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"{uuid.getnode():x}"
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    me = Peer(rank, socket.gethostname(), boot, os.getpid(), gpus)
    patience = _Patience(world_size)
    store = _open_store(patience, rank)
    if rank:
        return _join(store, me, patience)
    return _invite(store, me, world_size, patience)


class _Patience:
    """Waits a moment, says now and then for whom, and gives up at last."""

    def __init__(self, world_size: int) -> None:
        self.place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self._world_size, self._start = world_size, time.monotonic()
        self._say_at = self._start + _HINT_SECONDS
        self._give_up_at = self._start + _GIVE_UP_SECONDS

    def end_soon(self) -> None:
        """Give up in a moment."""
        self._give_up_at = time.monotonic() + _ANSWER_SECONDS

    def wait(self, here: Collection[int] | None = None) -> None:
        """Wait for those who are not here; without any, for rank 0."""
        now = time.monotonic()
        text = f"no answer at {self.place} yet; is torchrun running on that host?"
        if here is not None:
            missing = sorted(set(range(self._world_size)) - set(here))
            text = (
                f"waiting at {self.place} for {len(missing)} of {self._world_size} ranks "
                f"({', '.join(map(str, missing))}); was the program started on every host?"
            )
        if now > self._give_up_at:
            raise RankError(f"gave up after {now - self._start:.0f} s: {text}")
        if now > self._say_at:
            self._say_at += _AGAIN_SECONDS
            if os.environ.get("LOCAL_RANK", "0") == "0":
                log.warning("%s", text)
        time.sleep(0.1)


def _open_store(patience: _Patience, rank: int) -> dist.Store:
    """Connect to torchrun's store; without torchrun, rank 0 holds one."""
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    seconds = timedelta(seconds=_HINT_SECONDS)
    while True:
        try:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            return dist.TCPStore(
                *place, None, is_server, seconds, wait_for_workers=False, multi_tenant=True
            )
        except (KeyError, ValueError) as error:
            raise RankError(f"no place to meet ({error}): start with torchrun") from None
        except RuntimeError:
            patience.wait()


def _invite(store: dist.Store, me: Peer, world_size: int, patience: _Patience) -> Meeting:
    """Rank 0: take a connection from every other rank, then tell all of them who has come."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    links: dict[int, socket.socket] = {}
    peers = {0: me}
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
        server.settimeout(0.1)
        store.set(_PORT, str(server.getsockname()[1]))
        while len(links) < world_size - 1:
            try:
                link = server.accept()[0]
                peer = Peer(**json.loads(_read_line(link)))
                links[peer.rank], peers[peer.rank] = link, peer
            except (TimeoutError, ValueError, TypeError):  # others than ours may knock
                patience.wait(peers)
                for rank, link in links.items():
                    if _is_closed(link):
                        raise RankError(f"{peers[rank]} has died during rendezvous") from None
    name, roster = uuid.uuid4().hex, [peers[rank] for rank in range(world_size)]
    answer = json.dumps([name, *map(asdict, roster)]) + "\n"
    for link in links.values():
        link.settimeout(_ANSWER_SECONDS)
        with suppress(OSError):  # the watch notices who has died meanwhile
            link.sendall(answer.encode())
    return Meeting(roster, dist.PrefixStore(name, store), links)


def _join(store: dist.Store, me: Peer, patience: _Patience) -> Meeting:
    """Connect to rank 0 and wait until it has heard of all ranks."""
    while True:
        if store.check([_PORT]):
            with suppress(OSError, ValueError):
                place = os.environ["MASTER_ADDR"], int(store.get(_PORT))
                link = socket.create_connection(place, timeout=_ANSWER_SECONDS)
                link.sendall(f"{json.dumps(asdict(me))}\n".encode())
                answer = _read_line(link, _GIVE_UP_SECONDS)
                patience.end_soon()  # if this was rank 0, it has died
                name, *roster = json.loads(answer)
                peers = [Peer(**peer) for peer in roster]
                return Meeting(peers, dist.PrefixStore(name, store), {0: link})
        patience.wait()


def _read_line(link: socket.socket, seconds: float = _ANSWER_SECONDS) -> str:
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
