"""Watches over a job: a rank that dies, hangs or fails ends it, by name.

A thread of every rank keeps the connection to rank 0 (see `rendezvous`). A closed one is a death.
Once a second each rank reports its stage and its progress: steps, and within them exchanges begun
and bytes read. Rank 0 ends the job when a rank is not heard of, or makes no progress, for the
seconds that its stage may take; the other ranks watch rank 0. Where a rank waits for its user,
between steps or for input, there is no limit.

A rank that has left the job in order takes part in no exchange any more: if another one waits in
an exchange then, the job is ended as well.

Ending means `os._exit`: the main thread may sit in an exchange that will never end.
"""

import faulthandler
import json
import logging
import os
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dsv3.distributed.failure_report import is_lost, leave_report, log_file, reason_of
from dsv3.distributed.fuse import Fuse
from dsv3.distributed.rendezvous import Peer, Roster
from dsv3.distributed.seen import Seen
from dsv3.errors import Interrupted, RankError, one_line

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_LONGEST_TICK = 2.0  # more than that between two looks: this process was stopped, too
_STOP_SECONDS = 6.0  # for all ranks to end after a signal
_HINT_SECONDS = 30.0  # until we say who keeps the others from starting, and say it again
_START_UP_SECONDS, _START_UP_TIMEOUTS = 20.0, 3  # see `start_up_timeout`
_QUIET_SECONDS = 5.0  # without a word, a rank is the likeliest to be why the others wait
_FUSE_SECONDS = 3.0  # for the other ranks to say that one is stopped, before the system kills it
_DESERTED_SECONDS = 5.0  # in an exchange after another rank has left the job
_GRACE_SECONDS = 3.0  # for all ranks to leave the job after one has left it early
_CAUSE_SECONDS = 2.0  # a lost connection has a cause that another rank may tell
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
RUN = "run"  # the stage in which the program decides what is done
_EXCHANGES = str(Path(__file__).with_name("collectives.py"))


class Watchdog:
    """This rank's part. In a world of one it only turns signals into exceptions.

    Args:
        rank: of this process.
        met: all ranks, and connections; None in a world of one.
        timeout: seconds after which a silent or stuck rank ends the job.

    Attributes:
        asked: the signal that asked the job to end, or 0.
        counters: functions whose results grow as this rank gets on.
    """

    def __init__(self, rank: int = 0, met: Roster | None = None, timeout: float = 60.0) -> None:
        self.asked = 0
        self.counters: list[Callable[[], int]] = []
        self._rank, self._timeout = rank, timeout
        self._stage, self._limit = "start-up", start_up_timeout(timeout)
        self._is_starting = True
        self._peers: Sequence[Peer] = met.peers if met else ()
        self._links = dict(met.links) if met else {}
        self._unread = dict.fromkeys(self._links, b"")
        self._seen = {r: Seen() for r in (rank, *self._links)}
        self._advances, self._busy, self._leaving, self._stopping = 0, False, False, False
        self._is_waiting, self._has_news = False, False
        self._pending, self._interrupted, self._waited = False, False, 0.0
        self._due: tuple[float, str, int] | None = None  # when to end, why, with which exit code
        self._handlers: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def name_of(self, *ranks: int) -> str:
        """Return names for messages."""
        return ", ".join(str(self._peers[r]) if self._peers else f"rank {r}" for r in ranks)

    # What the main thread calls.

    def start(self) -> None:
        """Begin; from now on signals end the job in order."""
        if threading.current_thread() is threading.main_thread():
            usual = (signal.SIG_DFL, signal.default_int_handler)
            free = [number for number in _SIGNALS if signal.getsignal(number) in usual]
            self._handlers = {number: signal.signal(number, self._on_signal) for number in free}
        if self._peers:
            self._bell, self._ringer = socket.socketpair()
            self._ringer.setblocking(False)
            if self._handlers:
                signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False)
            self._thread.start()

    def enter(self, stage: str, may_rest: bool = False) -> None:
        """Name the stage of the main thread from now on; one that may not rest must get on."""
        self._stage, self._limit = stage, 0.0 if may_rest else start_up_timeout(self._timeout)
        self._is_starting, self._has_news = stage != RUN, True
        self.advance()
        self._ring()

    def advance(self) -> None:
        """Note that this rank gets on."""
        self._advances += 1

    @contextmanager
    def task(self, stage: str) -> Iterator[None]:
        """Do work that must get on, between stages that may rest."""
        before = self._stage, self._limit
        self._stage, self._limit = stage, self._timeout
        self.advance()
        try:
            yield
        finally:
            self._stage, self._limit = before

    @contextmanager
    def counting(self, count: Callable[[], int]) -> Iterator[None]:
        """Take a counter into account for a while."""
        self.counters.append(count)
        try:
            yield
        finally:
            self.counters.remove(count)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a place, outside of the collectives, that waits for other ranks."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a step of the main loop: it must get on, and if it fails it ends the job."""
        self._busy = True
        try:
            with self.task("a step"):
                yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if self._peers:
                self.fail(error)
            raise
        finally:
            self._busy = False
        if self._pending and self._rank == 0:
            self._interrupt()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Run an exchange outside of a step: one that fails since a rank is gone ends the job."""
        try:
            yield
        except RuntimeError as error:
            if self._peers and is_lost(error):
                self.fail(error)
            raise

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the groups after `leave`; it must not take longer than a rank may be stuck."""
        seconds = self._timeout
        text = f"{self.name_of(self._rank)} is stuck in closing its connections for {seconds:.0f} s"
        timer = threading.Timer(seconds, self._end, (text, True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def warn(self, reason: str, seconds: float) -> None:
        """Tell the others that this rank fails; who has not left by then is ended."""
        if self._rank:
            self._send("fault", [reason, seconds])
            seconds += _STOP_SECONDS / 2  # rank 0 is to end us all
        self._condemn(reason, seconds)

    def fail(self, error: BaseException) -> NoReturn:
        """End the job: this rank cannot go on, and the others may be anywhere."""
        log.debug("rank %d", self._rank, exc_info=error)
        name = "" if isinstance(error, RankError) else f"{self.name_of(self._rank)}: "
        if not self.asked:  # then the thread ends the job
            self.warn(name + reason_of(error), _CAUSE_SECONDS if is_lost(error) else 0.0)
        while True:
            time.sleep(_TICK_SECONDS)

    def leave(self, error: BaseException | None = None) -> None:
        """Leave the others: in order if all do, else ending them.

        A script may leave early on all ranks alike (`sys.exit`). If the others do not follow, the
        job is ended, as it is at once by any error that is not shared by all ranks.
        """
        if isinstance(error, KeyboardInterrupt):
            self.asked = self.asked or signal.SIGINT
        elif self._peers and error is not None and not getattr(error, "is_shared", False):
            if not isinstance(error, SystemExit | GeneratorExit):
                self.fail(error)
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            who = f"{self.name_of(self._rank)} has left the job ({reason})"
            self.warn(f"{who} while other ranks go on", _GRACE_SECONDS)
        self._leaving = True
        if self._peers:
            self._ring()
            if not self.asked:
                self._thread.join()
        if self._handlers and self._peers and not self.asked:
            signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler if not self.asked else signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self._interrupted:
            self.asked, self._pending = number, True
            if self._rank == 0 and not self._busy:
                self._interrupt()

    def _interrupt(self) -> NoReturn:
        """Raise at once or after the step; with other ranks only once, as all will end soon."""
        self._pending, self._interrupted = False, bool(self._peers)
        raise Interrupted(self.asked)

    def _ring(self) -> None:
        if self._thread.is_alive():
            with suppress(OSError):
                self._ringer.send(b"\0")

    def _condemn(self, text: str, seconds: float, code: int = 3) -> None:
        """End this rank in a while, unless it has left by then."""
        at = time.monotonic() + seconds
        if self._due is None or at < self._due[0]:
            self._due = at, text, code
        self._ring()

    # The thread: listen, tell, judge.

    def _run(self) -> None:
        fuse = Fuse()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._bell, selectors.EVENT_READ)
                for link in self._links.values():
                    link.settimeout(_TICK_SECONDS)
                    selector.register(link, selectors.EVENT_READ)
                told = heard = time.monotonic()
                while not (self._leaving and self._all_have_left()):
                    self._listen(selector, told + _TICK_SECONDS)
                    now = time.monotonic()
                    if now >= told + _TICK_SECONDS or self._has_news:
                        told = now
                        fuse.set(self._timeout + _FUSE_SECONDS)
                        self._tell_progress()
                    self._judge(min(now - heard, _LONGEST_TICK))
                    heard = now
            fuse.set(0)
        except BaseException:
            traceback.print_exc()
            os._exit(RankError.exit_code)

    def _listen(self, selector: selectors.BaseSelector, until: float) -> None:
        """Take in what the others tell and what the main thread or a signal wants."""
        if self._due is not None:
            until = min(until, self._due[0])
        ready = {key.fd for key, _ in selector.select(max(0.0, until - time.monotonic()))}
        # Deaths before signals: torchrun ends the others when one has died.
        for rank, link in list(self._links.items()):
            if link.fileno() in ready and not self._receive(rank, link):
                selector.unregister(link)
                del self._links[rank]
        if self._bell.fileno() in ready:
            for byte in self._bell.recv(4096):
                self.asked = byte or self.asked
        if self.asked and not self._stopping:
            self._stopping = True
            self._send("signal", self.asked)
            self._condemn("", _STOP_SECONDS, 128 + self.asked)
        if self._due is not None and time.monotonic() >= self._due[0]:
            self._end(self._due[1], code=self._due[2])

    def _receive(self, rank: int, link: socket.socket) -> bool:
        """Hear a rank; return whether it is still there."""
        try:
            data = link.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        for line in lines:
            self._hear(rank, *json.loads(line))
        if not data and self.asked:
            self._hear(rank, "bye", None)
        elif not data and not self._seen[rank].left:
            stage = self._seen[rank].stage
            self._end(f"{self.name_of(rank)} has died during {stage} (killed, or out of memory)")
        return bool(data)

    def _hear(self, rank: int, kind: str, value: Any) -> None:
        self._seen[rank].silent = 0.0
        if kind == "progress":
            self._seen[rank].note(*value)
        elif kind == "fault":
            self._condemn(*value)
        elif kind == "end":
            self._end(value[0], value[1], told=True)
        elif kind == "signal" and self._rank == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, value)
        elif kind == "signal":
            self.asked = value
        elif kind == "bye":
            self._seen[rank].left = True
            if self.asked and self._rank and not self._leaving:
                self._end("", code=128 + self.asked)  # the main thread may wait for rank 0

    def _send(self, kind: str, value: Any) -> None:
        data = json.dumps([kind, value]).encode() + b"\n"
        for link in list(self._links.values()):
            with suppress(OSError):  # it is noticed where we read
                link.sendall(data)

    def _tell_progress(self) -> None:
        self._has_news = False
        progress = self._advances + sum(count() for count in self.counters)
        waits = self._is_waiting or _is_in_exchange()
        mine = (progress, self._limit, waits, self._stage)
        self._seen[self._rank].note(*mine)
        self._send("progress", mine)

    def _all_have_left(self) -> bool:
        """Say that this rank leaves; rank 0 says so last, and then all may go."""
        others = all(seen.left for rank, seen in self._seen.items() if rank != self._rank)
        mine = self._seen[self._rank]
        if not mine.left and (self._rank or self.asked or others):
            mine.left = True
            self._send("bye", None)
        return others

    def _judge(self, elapsed: float) -> None:
        """End the job if a rank is silent, stuck or deserted for too long."""
        present = {rank: seen for rank, seen in self._seen.items() if not seen.left}
        for rank, seen in present.items():
            seen.silent += elapsed * (rank != self._rank)
            seen.stalled += elapsed
        if self.asked:
            return
        if self._rank == 0 and self._is_starting:
            self._hint([rank for rank, seen in present.items() if not seen.waits], elapsed)
        longest = max((seen.silent for seen in present.values()), default=0.0)
        if longest > self._timeout:
            limit = min(_QUIET_SECONDS, self._timeout / 2)
            quiet = [rank for rank, seen in present.items() if seen.silent > limit]
            what = f"not heard of for {longest:.0f} s (stopped, or its host cannot be reached)"
            self._end(f"{self.name_of(*quiet)} is {what}", stacks=True)
        if self._rank == 0:
            self._judge_progress(present)
            self._judge_left(present, elapsed)

    def _judge_progress(self, present: Mapping[int, Seen]) -> None:
        """End the job if a rank is stuck, or if all wait for each other.

        A rank that waits is stuck because of another one: of one that rests, if none else is.
        """
        stuck = [rank for rank, seen in present.items() if seen.is_stuck]
        causes = [rank for rank in stuck if not present[rank].waits]
        if stuck and not causes:
            causes = [rank for rank, seen in present.items() if not seen.waits and not seen.limit]
        if causes:
            seconds = max(present[rank].stalled for rank in stuck)
            stages = dict.fromkeys(present[rank].stage for rank in causes)
            what = f"stuck in {', '.join(stages)} for {seconds:.0f} s"
            self._end(f"{self.name_of(*causes)} is {what}", stacks=True)
        stalled = min((seen.stalled for seen in present.values() if seen.waits), default=0.0)
        are_all = len(present) == len(self._seen) and all(seen.waits for seen in present.values())
        if are_all and stalled > self._timeout:
            self._end(
                f"all ranks wait for each other for {stalled:.0f} s, in different exchanges: they "
                "must make the same calls",
                stacks=True,
            )

    def _judge_left(self, present: Mapping[int, Seen], elapsed: float) -> None:
        """End the job if a rank waits in an exchange for one that has left."""
        left = [rank for rank, seen in self._seen.items() if seen.left]
        if self._leaving:
            left.append(self._rank)
        for rank, seen in present.items():
            if left and rank not in left and seen.waits and seen.silent < _LONGEST_TICK:
                seen.deserted += elapsed
            if seen.deserted > _DESERTED_SECONDS:
                self._end(
                    f"{self.name_of(*left)} has left the job while {self.name_of(rank)} waits for "
                    "it: all ranks must make the same calls"
                )

    def _hint(self, slow: Sequence[int], elapsed: float) -> None:
        """Say for whom the others wait during start-up, which may take long."""
        self._waited = self._waited + elapsed if 0 < len(slow) < len(self._peers) else 0.0
        if self._waited > _HINT_SECONDS:
            self._waited = 0.0
            os.write(2, f"waiting for {self.name_of(*slow)}: {self._stage}\n".encode())

    def _end(self, text: str, stacks: bool = False, told: bool = False, code: int = 3) -> NoReturn:
        """End this rank and the others. Rank 0 tells why; without it, one rank of each host."""
        threading.Timer(_CAUSE_SECONDS, os._exit, (code,)).start()  # should a terminal be paused
        text = one_line(text)
        mine = self._peers[self._rank]
        here = [p for p in self._peers if (p.host, p.boot) == (mine.host, mine.boot)]
        if text and not told:
            self._send("end", [text, stacks])
            if self._rank in (0, *[p.rank for p in here if p.rank][:1]):
                os.write(2, f"error: {text}\n".encode())
        for peer in here:  # torchrun would wait half a minute for the end of one that is stopped
            with suppress(OSError):
                os.kill(peer.pid, signal.SIGCONT)
        own_log = log_file()
        report = f"error: {text}\n" if own_log != 2 else ""
        if stacks:
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                report += f"stacks of {self.name_of(self._rank)}:\n{file.read()}"
        if stacks or own_log != 2:
            os.write(own_log, report.encode())
        if text:
            leave_report(f"error: {text}")
        os._exit(code)


def start_up_timeout(timeout: float) -> float:
    """Return the seconds without progress that a stage of start-up may take.

    Hosts do not start at the same moment, and the first steps compile kernels.
    """
    return max(_START_UP_SECONDS, _START_UP_TIMEOUTS * timeout)


def _is_in_exchange() -> bool:
    """Tell whether the main thread waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename != _EXCHANGES:
        frame = frame.f_back
    return frame is not None
