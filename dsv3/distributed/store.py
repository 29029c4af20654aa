"""The store through which the ranks find each other, and how long they wait for it."""

import logging
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dsv3.distributed.launcher import environment_local_rank, meeting_point
from dsv3.errors import RankError

log = logging.getLogger(__name__)

LATER_SECONDS = 5.0  # that the other ranks wait longer than rank 0, which knows who is missing
_HINT_SECONDS, _AGAIN_SECONDS = 5.0, 60.0  # until a message says who is missing, and says it again


class Patience:
    """Waits a moment, says now and then for what, and gives up at last."""

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.place = meeting_point()
        # Without torchrun, rank 0 holds the store.
        self.is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._ranks, self._start = range(world_size), time.monotonic()
        self._say_at = self._start + _HINT_SECONDS
        self._give_up_at = self._start + timeout
        self._reason = f"no answer at {self.place} yet; is rank 0 running on that host?"
        if self.is_server:
            self._reason = (
                f"{self.place} cannot be reached or is used by another program; check MASTER_ADDR "
                "and MASTER_PORT"
            )

    @property
    def seconds_left(self) -> float:
        """Seconds until this rank gives up."""
        return max(0.1, self._give_up_at - time.monotonic())

    def end_soon(self) -> None:
        """Give up in a moment."""
        self._give_up_at = min(self._give_up_at, time.monotonic() + LATER_SECONDS)

    def error(self) -> RankError:
        """Return the error that says which ranks, or what else, this rank has waited for."""
        seconds = time.monotonic() - self._start
        return RankError(
            f"gave up after {seconds:.0f} s: {self._reason} (a longer rank timeout waits longer)"
        )

    def check(self, here: Collection[int] | None = None) -> None:
        """Say which ranks are not here, or that rank 0 is not; raise if it is time to give up."""
        now = time.monotonic()
        if here is not None:
            missing = [rank for rank in self._ranks if rank not in here]
            self._reason = (
                f"waiting at {self.place} for {len(missing)} of {len(self._ranks)} ranks "
                f"({', '.join(map(str, missing))}); was the program started on every host?"
            )
        if now > self._give_up_at:
            raise self.error()
        if now > self._say_at:
            self._say_at += _AGAIN_SECONDS
            if environment_local_rank() == 0:
                log.warning("%s", self._reason)

    def wait(self) -> None:
        """Wait a moment for rank 0."""
        self.check()
        time.sleep(0.1)


def open_store(patience: Patience) -> dist.Store:
    """Connect to torchrun's store, or to that of rank 0; on rank 0 without torchrun, make it.

    May never return: torch waits without a limit for a server that is stopped or is not a store.
    """
    place, seconds = patience.place, timedelta(seconds=_HINT_SECONDS)
    while True:
        with suppress(OSError, RuntimeError):
            is_server = patience.is_server and _is_free(place.port)
            # Tried here first: where torch cannot connect, it writes stacks to standard error.
            if is_server:
                socket.getaddrinfo(place.host, place.port)
            else:
                socket.create_connection((place.host, place.port), timeout=_HINT_SECONDS).close()
            return dist.TCPStore(
                place.host,
                place.port,
                None,
                is_server,
                seconds,
                wait_for_workers=False,
                multi_tenant=True,
            )
        patience.wait()


def _is_free(port: int) -> bool:
    """Return True if no process listens at a port of this host; else it may be another rank 0."""
    with suppress(OSError), socket.create_server(("", port)):
        return True
    return False
