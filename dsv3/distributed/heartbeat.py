"""Heartbeats of the ranks, and the verdict on a rank that is silent, stuck or has left early."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

LONGEST_TICK = 2.0  # seconds; if two ticks are further apart, this process itself was stopped
_QUIET_SECONDS = 5.0  # a rank silent for this long is named together with the most silent one
_DESERTED_SECONDS = 5.0  # in an exchange after another rank has left the job
# See `start_up_timeout`.
_START_UP_SECONDS = 20.0
_START_UP_TIMEOUTS = 3
_HINT_SECONDS = 30.0  # until start-up names the ranks it waits for, and names them again


@dataclass(slots=True)
class Heartbeat:
    """A rank's last heartbeat, and the seconds without any, or without progress.

    Attributes:
        progress: counter that grows while the rank makes progress.
        limit: seconds without progress after which the rank is stuck; 0: no limit.
        is_waiting: in an exchange, for other ranks.
        stage: name of the rank's current work.
        silent: seconds without a heartbeat.
        stalled: seconds without progress.
        deserted: seconds in an exchange after another rank has left.
        has_left: the rank has left the job in order.
    """

    progress: int = 0
    limit: float = 0.0
    is_waiting: bool = False
    stage: str = "start-up"
    silent: float = 0.0
    stalled: float = 0.0
    deserted: float = 0.0
    has_left: bool = False

    @property
    def is_stuck(self) -> bool:
        """True if the rank has made no progress for longer than its stage may take."""
        return 0 < self.limit < self.stalled

    def update(self, progress: int, limit: float, is_waiting: bool, stage: str) -> None:
        """Take over a new heartbeat."""
        if (progress, stage) != (self.progress, self.stage):
            self.stalled = 0.0
            self.deserted = 0.0
        self.progress = progress
        self.limit = limit
        self.is_waiting = is_waiting
        self.stage = stage


class Verdict(NamedTuple):
    """A reason to end the job.

    Attributes:
        reason: one line that names the ranks at fault.
        with_stacks: every rank writes its Python stacks to its log.
    """

    reason: str
    with_stacks: bool


class HeartbeatMonitor:
    """The heartbeats that one rank receives: all ranks' on rank 0, rank 0's on the others.

    Args:
        rank: this rank.
        others: the ranks whose heartbeats it receives.
        timeout: seconds after which a silent or stuck rank ends the job.
        name_of: returns the names of ranks for messages.

    Attributes:
        heartbeats: by rank, including this one's own.
    """

    def __init__(
        self, rank: int, others: Iterable[int], timeout: float, name_of: Callable[..., str]
    ) -> None:
        self.heartbeats = {r: Heartbeat() for r in (rank, *others)}
        self._rank = rank
        self._timeout = timeout
        self._name_of = name_of
        self._seconds_to_start = 0.0

    @property
    def own(self) -> Heartbeat:
        """This rank's own heartbeat."""
        return self.heartbeats[self._rank]

    @property
    def have_others_left(self) -> bool:
        """True if all other ranks have left the job."""
        return all(beat.has_left for rank, beat in self.heartbeats.items() if rank != self._rank)

    def add_seconds(self, elapsed: float) -> None:
        """Count the time since the last tick."""
        for rank, beat in self._present().items():
            if rank != self._rank:
                beat.silent += elapsed
            beat.stalled += elapsed

    def verdict(self, elapsed: float, is_leaving: bool) -> Verdict | None:
        """Return a reason to end the job, if a rank is silent, stuck or deserted for too long.

        Args:
            elapsed: seconds since the last tick.
            is_leaving: this rank takes part in no further exchange.
        """
        present = self._present()
        verdict = self._silence(present)
        if verdict is None and self._rank == 0:
            verdict = self._lack_of_progress(present) or self._desertion(elapsed, is_leaving)
        return verdict

    def slow_to_start(self, elapsed: float) -> list[int]:
        """Return the ranks that the others have waited for during start-up for 30 seconds.

        Empty in between, and if no rank or all ranks are busy.
        """
        busy = [rank for rank, beat in self._present().items() if not beat.is_waiting]
        if not 0 < len(busy) < len(self.heartbeats):
            self._seconds_to_start = 0.0
            return []
        self._seconds_to_start += elapsed
        if self._seconds_to_start <= _HINT_SECONDS:
            return []
        self._seconds_to_start = 0.0
        return busy

    def _present(self) -> dict[int, Heartbeat]:
        return {rank: beat for rank, beat in self.heartbeats.items() if not beat.has_left}

    def _silence(self, present: Mapping[int, Heartbeat]) -> Verdict | None:
        longest = max((beat.silent for beat in present.values()), default=0.0)
        if longest <= self._timeout:
            return None
        limit = min(_QUIET_SECONDS, self._timeout / 2)
        quiet = [rank for rank, beat in present.items() if beat.silent > limit]
        return Verdict(
            f"{self._name_of(*quiet)} is not heard of for {longest:.0f} s "
            "(stopped, or its host cannot be reached)",
            with_stacks=True,
        )

    def _lack_of_progress(self, present: Mapping[int, Heartbeat]) -> Verdict | None:
        """Return a verdict if a rank is stuck, or if all ranks wait for each other.

        A stuck rank that waits for others is not at fault: a stuck rank that does not wait is, and
        if there is none, the ranks that neither wait nor have a limit.
        """
        stuck = [rank for rank, beat in present.items() if beat.is_stuck]
        causes = [rank for rank in stuck if not present[rank].is_waiting]
        if stuck and not causes:
            causes = [
                rank for rank, beat in present.items() if not beat.is_waiting and not beat.limit
            ]
        if causes:
            seconds = max(present[rank].stalled for rank in stuck)
            stages = dict.fromkeys(present[rank].stage for rank in causes)
            return Verdict(
                f"{self._name_of(*causes)} is stuck in {', '.join(stages)} for {seconds:.0f} s",
                with_stacks=True,
            )
        if len(present) < len(self.heartbeats):
            return None
        if not all(beat.is_waiting for beat in present.values()):
            return None
        stalled = min(beat.stalled for beat in present.values())
        if stalled <= max(self._timeout, *(beat.limit for beat in present.values())):
            return None
        return Verdict(
            f"all ranks wait for each other for {stalled:.0f} s, in different exchanges: they "
            "must make the same calls",
            with_stacks=True,
        )

    def _desertion(self, elapsed: float, is_leaving: bool) -> Verdict | None:
        """Return a verdict if a rank waits in an exchange for one that has left."""
        left = [rank for rank, beat in self.heartbeats.items() if beat.has_left]
        if is_leaving:
            left.append(self._rank)
        for rank, beat in self._present().items():
            if left and rank not in left and beat.is_waiting and beat.silent < LONGEST_TICK:
                beat.deserted += elapsed
            if beat.deserted > _DESERTED_SECONDS:
                return Verdict(
                    f"{self._name_of(*left)} has left the job while {self._name_of(rank)} waits "
                    "for it: all ranks must make the same calls",
                    with_stacks=False,
                )
        return None


def start_up_timeout(timeout: float) -> float:
    """Return the seconds without progress that a stage of start-up may take.

    Hosts do not start at the same moment, and the first steps compile kernels.
    """
    return max(_START_UP_SECONDS, _START_UP_TIMEOUTS * timeout)
