"""The store through which the ranks find each other, and the limits of waiting for it."""

import logging
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from dsv3.distributed.launcher import environment_local_rank, rendezvous_address
from dsv3.errors import RankError

log = logging.getLogger(__name__)

# The other ranks wait longer than rank 0, which can name the missing ranks.
EXTRA_SECONDS = 5.0
# Until a warning names the missing ranks, and between further warnings.
_HINT_SECONDS = 5.0
_REPEAT_SECONDS = 60.0


class Backoff:
    """Waiting for other ranks: pauses, warns about missing ranks, and gives up after a timeout."""

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.address = rendezvous_address()
        # Without torchrun, rank 0 hosts the store.
        self.is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._ranks = range(world_size)
        self._start = time.monotonic()
        self._warn_at = self._start + _HINT_SECONDS
        self._give_up_at = self._start + timeout
        self._reason = f"no answer at {self.address} yet; is rank 0 running on that host?"
        if self.is_server:
            self._reason = (
                f"{self.address} cannot be reached or is used by another program; check "
                "MASTER_ADDR and MASTER_PORT"
            )

    @property
    def seconds_left(self) -> float:
        """Seconds until this rank gives up."""
        return max(0.1, self._give_up_at - time.monotonic())

    def end_soon(self) -> None:
        """Give up after `EXTRA_SECONDS` at the latest."""
        self._give_up_at = min(self._give_up_at, time.monotonic() + EXTRA_SECONDS)

    def error(self) -> RankError:
        """Return the error of giving up, which names the missing ranks or the address."""
        seconds = time.monotonic() - self._start
        return RankError(
            f"gave up after {seconds:.0f} s: {self._reason} (a longer rank timeout waits longer)"
        )

    def check(self, present: Collection[int] | None = None) -> None:
        """Log a warning if it is time for one.

        Args:
            present: on rank 0, the ranks that have connected.

        Raises:
            RankError: it is time to give up.
        """
        now = time.monotonic()
        if present is not None:
            missing = [rank for rank in self._ranks if rank not in present]
            self._reason = (
                f"waiting at {self.address} for {len(missing)} of {len(self._ranks)} ranks "
                f"({', '.join(map(str, missing))}); was the program started on every host?"
            )
        if now > self._give_up_at:
            raise self.error()
        if now > self._warn_at:
            self._warn_at += _REPEAT_SECONDS
            if environment_local_rank() == 0:
                log.warning("%s", self._reason)

    def wait(self) -> None:
        """Wait 0.1 seconds for rank 0."""
        self.check()
        time.sleep(0.1)


def open_store(backoff: Backoff) -> dist.Store:
    """Connect to the store of torchrun or of rank 0; on rank 0 without torchrun, host it.

    May never return: torch waits without a limit for a server that is stopped or is not a store.
    """
    host = backoff.address.host
    port = backoff.address.port
    while True:
        with suppress(OSError, RuntimeError):
            # Connect here first: if torch cannot connect, it writes stacks to standard error.
            if backoff.is_server and _is_free(port):
                socket.getaddrinfo(host, port)
                return _host_store(host, port)
            socket.create_connection((host, port), timeout=_HINT_SECONDS).close()
            return _make_store(host, port, is_server=False)
        backoff.wait()


@cache
def _host_store(host: str, port: int) -> dist.TCPStore:
    """Host a store until this process ends.

    A script may make several LLMs, one after another: when rank 0 has left the first one's
    rendezvous, other ranks may still be connected to its store.
    """
    return _make_store(host, port, is_server=True)


def _make_store(host: str, port: int, is_server: bool) -> dist.TCPStore:
    return dist.TCPStore(
        host,
        port,
        world_size=None,
        is_master=is_server,
        timeout=timedelta(seconds=_HINT_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _is_free(port: int) -> bool:
    """Return True if no process listens at a port of this host, such as another rank 0."""
    with suppress(OSError), socket.create_server(("", port)):
        return True
    return False
