"""The end of a process whose job has failed or was asked to end.

A process is ended by `os._exit`, in a user's script too: the main thread may be in an exchange that
never ends. Gloo's exchanges raise when a peer has died, but not when it is stopped or hangs, and
aborting the process group (`ProcessGroupGloo.abort`, torch 2.13) does not free a waiting thread.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from dsv3.distributed.failure_report import leave_report, report_in_log
from dsv3.distributed.peer_links import PeerLinks
from dsv3.distributed.rendezvous import Peer
from dsv3.errors import RankError, one_line

_WRITE_SECONDS = 2.0  # for the reports; writing may block, for example on a paused terminal


class _Schedule(NamedTuple):
    """When the process ends (monotonic seconds), why, and its exit code."""

    at: float
    reason: str
    code: int


class JobEnd:
    """Ends this rank and the others, at once or at a scheduled time.

    Args:
        rank: of this process.
        peers: all ranks; empty in a world of one.
        links: this rank's connections.

    Attributes:
        before_end: called with the error before the process ends. It has a second.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], links: PeerLinks) -> None:
        self.before_end: Callable[[str], None] = lambda error: None
        self._rank = rank
        self._peers = peers
        self._links = links
        self._schedule = _Schedule(math.inf, "", 0)  # replaced whole: two threads use it

    @property
    def prints_errors(self) -> bool:
        """True on rank 0, and on one other rank of each host, in case rank 0 cannot."""
        others = [peer.rank for peer in self._local_peers() if peer.rank]
        return self._rank in (0, *others[:1])

    @property
    def at(self) -> float:
        """Monotonic seconds of the scheduled end; infinite if there is none."""
        return self._schedule.at

    def schedule(self, reason: str, seconds: float, code: int) -> None:
        """End the job after `seconds`, unless an earlier end is scheduled."""
        new = _Schedule(time.monotonic() + seconds, reason, code)
        if new.at < self.at:
            self._schedule = new

    def run_if_due(self) -> None:
        """End the job if the scheduled time has come."""
        due = self._schedule
        if time.monotonic() >= due.at:
            self.run(due.reason, code=due.code)

    def run(
        self,
        text: str,
        with_stacks: bool = False,
        is_reported: bool = False,
        code: int = RankError.exit_code,
    ) -> NoReturn:
        """End this rank and the others.

        Args:
            text: the error; empty after a signal.
            with_stacks: write the stacks of all threads to the log.
            is_reported: another rank has sent the error to all ranks.
            code: exit code.
        """
        threading.Timer(_WRITE_SECONDS, os._exit, (code,)).start()
        text = one_line(text)
        if text and not is_reported:
            self._links.send("end", [text, with_stacks])
            if self.prints_errors:
                os.write(2, f"error: {text}\n".encode())
        for peer in self._local_peers():
            with suppress(OSError):  # torchrun would wait half a minute for a stopped process
                os.kill(peer.pid, signal.SIGCONT)
        report_in_log(f"error: {text}", str(self._peers[self._rank]), with_stacks)
        if text:
            leave_report(f"error: {text}")
        with suppress(Exception):
            self.before_end(text)
        os._exit(code)

    def _local_peers(self) -> list[Peer]:
        """Return the ranks of this host."""
        hosts = [(peer.host, peer.boot) for peer in self._peers]
        return [self._peers[i] for i, host in enumerate(hosts) if host == hosts[self._rank]]
