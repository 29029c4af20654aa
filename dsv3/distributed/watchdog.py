"""Watchdog of a job: a rank that dies, hangs or fails ends the job, with an error that names it.

A thread of every rank keeps the connection to rank 0 (see `rendezvous`). A closed connection means
that the rank has died. Once a second each rank sends a heartbeat with its stage and its progress:
steps, and within them exchanges begun and bytes read. Rank 0 ends the job when a rank sends no
heartbeat, or makes no progress, for the seconds that its stage may take; the other ranks watch
rank 0. While a rank waits for its user, between steps or for input, there is no limit.

A rank that has left the job in order takes part in no further exchange: if another rank waits in
an exchange then, the job is ended as well.

No signal handler is installed here: those of a program call `request_end` (launch/process.py).
"""

import logging
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from dsv3.distributed.failure_report import is_lost, reason_of
from dsv3.distributed.heartbeat import LONGEST_TICK, HeartbeatMonitor, start_up_timeout
from dsv3.distributed.job_end import JobEnd
from dsv3.distributed.peer_links import PeerLinks
from dsv3.distributed.rendezvous import Peer, Roster
from dsv3.errors import Interrupted, RankError

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_STOP_SECONDS = 6.0  # for all ranks to end after a signal
_GRACE_SECONDS = 3.0  # for all ranks to leave the job after one has left it early
_CAUSE_SECONDS = 2.0  # for another rank to report the cause of a lost connection
RUN = "run"  # the stage after start-up


class Watchdog:
    """This rank's part of the watchdog. In a world of one it has no thread.

    Messages of other ranks may ask for an end as well: rank 0 then sends the signal to its own main
    thread, where it has the effect that the program or the script has chosen.

    Args:
        rank: of this process.
        roster: all ranks, and this rank's connections; None in a world of one.
        timeout: seconds after which a silent or stuck rank ends the job.

    Attributes:
        end_signal: number of the signal that asked the job to end, or 0.
        counters: functions whose results grow while this rank makes progress.
        in_exchange: returns True while the main thread waits for other ranks in a collective.
        job_end: how this process is ended.
    """

    def __init__(self, rank: int = 0, roster: Roster | None = None, timeout: float = 60.0) -> None:
        self.end_signal = 0
        self.counters: list[Callable[[], int]] = []
        self.in_exchange: Callable[[], bool] = lambda: False
        self._rank = rank
        self._timeout = timeout
        self._peers: Sequence[Peer] = roster.peers if roster else ()
        self._links = PeerLinks(roster.links if roster else {})
        self.job_end = JobEnd(rank, self._peers, self._links)
        # If rank 0 is silent, the rank that prints the error ends the job first.
        patience = timeout if self.job_end.prints_errors else timeout + LONGEST_TICK
        self._monitor = HeartbeatMonitor(rank, self._links, patience, self.name_of)
        # State of the main thread.
        self._stage = "start-up"
        self._limit = start_up_timeout(timeout)
        self._is_starting = True
        self._num_advances = 0
        self._is_in_step = False
        self._is_waiting = False
        self._is_leaving = False
        self._is_interrupt_due = False
        self._is_interrupted = False
        # State of the thread.
        self._is_heartbeat_due = False
        self._has_sent_signal = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def name_of(self, *ranks: int) -> str:
        """Return the names of ranks for messages, separated by commas."""
        return ", ".join(str(self._peers[r]) if self._peers else f"rank {r}" for r in ranks)

    # Called by the main thread.

    def start(self) -> None:
        """Start the thread, in a world of several."""
        if self._peers:
            self._wakeup_reader, self._wakeup_writer = socket.socketpair()
            self._wakeup_writer.setblocking(False)
            self._thread.start()

    @property
    def wakeup_fd(self) -> int:
        """Descriptor for `signal.set_wakeup_fd`: the thread learns of a signal at once.

        -1 in a world of one.
        """
        return self._wakeup_writer.fileno() if self._peers else -1

    def enter(self, stage: str, may_rest: bool = False) -> None:
        """Begin a stage of the main thread; unless it may rest, it must make progress."""
        self._stage = stage
        self._limit = 0.0 if may_rest else start_up_timeout(self._timeout)
        self._is_starting = stage != RUN
        self._is_heartbeat_due = True
        self.advance()
        self._wake()

    def advance(self) -> None:
        """Record that this rank makes progress."""
        self._num_advances += 1

    @contextmanager
    def task(self, stage: str) -> Iterator[None]:
        """Run work that must make progress, within a stage that may rest."""
        outer_stage = self._stage
        outer_limit = self._limit
        self._stage = stage
        self._limit = self._timeout
        self.advance()
        try:
            yield
        finally:
            self._stage = outer_stage
            self._limit = outer_limit

    @contextmanager
    def counting(self, count: Callable[[], int]) -> Iterator[None]:
        """Count the growth of `count()` as progress within the block."""
        self.counters.append(count)
        try:
            yield
        finally:
            self.counters.remove(count)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a block, outside of the collectives, that waits for other ranks."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a step of the main loop: it must make progress, and a failure ends the job."""
        self._is_in_step = True
        try:
            with self.task("a step"):
                yield
        except (KeyboardInterrupt, SystemExit):  # `leave` ends the job
            raise
        except BaseException as error:
            if self._peers:
                self.fail(error)
            raise
        finally:
            self._is_in_step = False
        if self._is_interrupt_due and self._rank == 0:
            self._interrupt()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Run an exchange outside of a step: if it fails because a rank is gone, end the job."""
        try:
            yield
        except RuntimeError as error:
            if self._peers and is_lost(error):
                self.fail(error)
            raise

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the groups after `leave`, within the timeout of a stuck rank."""
        seconds = self._timeout
        text = f"{self.name_of(self._rank)} is stuck in closing its connections for {seconds:.0f} s"
        timer = threading.Timer(seconds, self.job_end.run, (text, True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def warn(self, reason: str, seconds: float) -> None:
        """Report to the others that this rank fails; ranks still in the job then are ended."""
        if self._rank:
            self._links.send("failure", [reason, seconds])
            seconds += _STOP_SECONDS / 2  # rank 0 ends all ranks before that
        self._schedule_exit(reason, seconds)

    def fail(self, error: BaseException) -> NoReturn:
        """End the job: this rank cannot continue, and the other ranks may be anywhere."""
        log.debug("rank %d", self._rank, exc_info=error)
        name = "" if isinstance(error, RankError) else f"{self.name_of(self._rank)}: "
        if not self.end_signal:  # otherwise the thread ends the job
            self.warn(name + reason_of(error), _CAUSE_SECONDS if is_lost(error) else 0.0)
        while True:
            time.sleep(_TICK_SECONDS)

    @contextmanager
    def membership(self) -> Iterator[None]:
        """Leave the job at the end of the block."""
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise
        self._leave()

    def _leave(self, error: BaseException | None = None) -> None:
        """Leave the job: in order if all ranks leave, else the job is ended.

        A script may leave early on all ranks alike (`sys.exit`). If the others do not follow, the
        job is ended, as it is at once by any error that is not shared by all ranks.
        """
        if isinstance(error, KeyboardInterrupt):
            self.end_signal = self.end_signal or signal.SIGINT
        elif self._peers and error is not None and not getattr(error, "seen_by_all_ranks", False):
            if not isinstance(error, SystemExit | GeneratorExit):
                self.fail(error)
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            name = self.name_of(self._rank)
            self.warn(f"{name} has left the job ({reason}) while other ranks go on", _GRACE_SECONDS)
        self._is_leaving = True
        if self._peers:
            self._wake()
            if not self.end_signal:
                self._thread.join()

    def request_end(self, number: int) -> None:
        """End the job in order, as a signal asks. Called by a signal handler of the main thread.

        On rank 0, raises `Interrupted` between steps: now, or at the end of the current one.
        """
        if not self._is_interrupted:
            self.end_signal = number
            self._is_interrupt_due = True
            if self._rank == 0 and not self._is_in_step:
                self._interrupt()

    def _interrupt(self) -> NoReturn:
        """Raise `Interrupted`; in a world of several only once, because all ranks end soon."""
        self._is_interrupt_due = False
        self._is_interrupted = bool(self._peers)
        raise Interrupted(self.end_signal)

    def _wake(self) -> None:
        """Make the thread run at once."""
        if self._thread.is_alive():
            with suppress(OSError):
                self._wakeup_writer.send(b"\0")

    def _schedule_exit(self, reason: str, seconds: float, code: int = 3) -> None:
        """End this rank after `seconds`, unless it has left by then."""
        self.job_end.schedule(reason, seconds, code)
        self._wake()

    # The thread.

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wakeup_reader, selectors.EVENT_READ)
                self._links.register(selector, _TICK_SECONDS)
                last_sent = last_judged = time.monotonic()
                while not (self._is_leaving and self._have_all_left()):
                    self._listen(selector, last_sent + _TICK_SECONDS)
                    now = time.monotonic()
                    if now >= last_sent + _TICK_SECONDS or self._is_heartbeat_due:
                        last_sent = now
                        self._send_heartbeat()
                    self._judge(min(now - last_judged, LONGEST_TICK))
                    last_judged = now
        except BaseException:
            traceback.print_exc()
            os._exit(RankError.exit_code)

    def _listen(self, selector: selectors.BaseSelector, until: float) -> None:
        """Read messages from peers, wake-ups from the main thread, and signals."""
        until = min(until, self.job_end.at)
        ready = {key.fd for key, _ in selector.select(max(0.0, until - time.monotonic()))}
        # Closed connections before signals: torchrun ends the other ranks when one has died.
        for rank in self._links:
            if self._links.descriptor(rank) in ready and not self._receive(rank):
                self._links.drop(rank, selector)
        if self._wakeup_reader.fileno() in ready:
            for byte in self._wakeup_reader.recv(4096):
                self.end_signal = byte or self.end_signal
        if self.end_signal and not self._has_sent_signal:
            self._has_sent_signal = True
            self._links.send("signal", self.end_signal)
            self._schedule_exit("", _STOP_SECONDS, 128 + self.end_signal)
        self.job_end.run_if_due()

    def _receive(self, rank: int) -> bool:
        """Handle the messages of a rank; return False if its connection is closed."""
        messages, is_open = self._links.receive(rank)
        for kind, value in messages:
            self._handle(rank, kind, value)
        beat = self._monitor.heartbeats[rank]
        if not is_open and self.end_signal:
            self._handle(rank, "left", None)
        elif not is_open and not beat.has_left:
            name = self.name_of(rank)
            self.job_end.run(f"{name} has died during {beat.stage} (killed, or out of memory)")
        return is_open

    def _handle(self, rank: int, kind: str, value: Any) -> None:
        """Act on a message of another rank."""
        beat = self._monitor.heartbeats[rank]
        beat.silent = 0.0
        if kind == "heartbeat":
            beat.update(*value)
        elif kind == "failure":
            self._schedule_exit(*value)
        elif kind == "end":
            if self._rank == 0:  # the other ranks have no connections to each other
                self._links.send("end", value)
            self.job_end.run(value[0], value[1], is_reported=True)
        elif kind == "signal":
            is_new = not self.end_signal
            self.end_signal = value
            if self._rank == 0 and is_new:
                signal.pthread_kill(threading.main_thread().ident or 0, value)
        elif kind == "left":
            beat.has_left = True
            if self.end_signal and self._rank and not self._is_leaving:
                self.job_end.run(
                    "", code=128 + self.end_signal
                )  # the main thread may wait for rank 0

    def _send_heartbeat(self) -> None:
        self._is_heartbeat_due = False
        progress = self._num_advances + sum(count() for count in self.counters)
        is_waiting = self._is_waiting or self.in_exchange()
        heartbeat = (progress, self._limit, is_waiting, self._stage)
        self._monitor.own.update(*heartbeat)
        self._links.send("heartbeat", heartbeat)

    def _have_all_left(self) -> bool:
        """Send that this rank leaves; return True if all others have left.

        Rank 0 sends it last, which lets all ranks go.
        """
        have_others_left = self._monitor.have_others_left
        own = self._monitor.own
        if not own.has_left and (self._rank or self.end_signal or have_others_left):
            own.has_left = True
            self._links.send("left", None)
        return have_others_left

    def _judge(self, elapsed: float) -> None:
        """End the job if a rank is silent, stuck or deserted; during start-up name slow ranks."""
        self._monitor.add_seconds(elapsed)
        if self.end_signal:
            return
        if self._rank == 0 and self._is_starting:
            slow = self._monitor.slow_to_start(elapsed)
            if slow:
                os.write(2, f"waiting for {self.name_of(*slow)}: {self._stage}\n".encode())
        verdict = self._monitor.verdict(elapsed, self._is_leaving)
        if verdict is not None:
            self.job_end.run(verdict.reason, verdict.with_stacks)
