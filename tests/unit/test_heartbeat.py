"""Verdicts on ranks that are silent, stuck, deserted, or wait for each other."""

import torch

from dsv3.distributed.collectives import ExchangeMark, Pending
from dsv3.distributed.heartbeat import HeartbeatMonitor, Verdict


def name_of(*ranks: int) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def monitor(rank: int = 0, others: tuple[int, ...] = (1, 2)) -> HeartbeatMonitor:
    return HeartbeatMonitor(rank, others, 10.0, name_of)


def beat(watched: HeartbeatMonitor, *waiting: int, limit: float = 10.0) -> None:
    """Send a heartbeat from every rank, without progress."""
    for rank, heartbeat in watched.heartbeats.items():
        heartbeat.silent = 0.0
        heartbeat.update(0, limit, rank in waiting, "a step")


def reason(watched: HeartbeatMonitor, elapsed: float, is_leaving: bool = False) -> str:
    watched.add_seconds(elapsed)
    verdict = watched.verdict(elapsed, is_leaving)
    return verdict.reason if verdict else ""


def test_a_silent_rank_ends_the_job_after_the_timeout() -> None:
    watched = monitor()
    beat(watched, limit=0.0)
    watched.heartbeats[2].silent = 9.0
    assert reason(watched, 1.0) == ""
    assert reason(watched, 1.0).startswith("rank 2 is not heard of for 11 s (stopped, or")


def test_other_ranks_watch_the_silence_of_rank_0_only() -> None:
    watched = monitor(1, (0,))
    beat(watched, limit=1.0)
    assert reason(watched, 9.0) == ""
    assert reason(watched, 2.0).startswith("rank 0 is not heard of for 11 s")


def test_a_stuck_rank_is_named_and_ranks_that_wait_for_it_are_not() -> None:
    watched = monitor()
    for _ in range(6):
        beat(watched, 0, 2)
        found = reason(watched, 2.0)
    assert found == "rank 1 is stuck in a step for 12 s"


def test_progress_restarts_the_time() -> None:
    watched = monitor()
    for step in range(20):
        for heartbeat in watched.heartbeats.values():
            heartbeat.silent = 0.0
            heartbeat.update(step, 10.0, False, "a step")
        assert reason(watched, 2.0) == ""


def test_a_rank_that_rests_is_named_if_all_stuck_ranks_wait() -> None:
    watched = monitor()
    for _ in range(6):
        beat(watched, 0, 1)
        watched.heartbeats[2].limit = 0.0
        found = reason(watched, 2.0)
    assert found == "rank 2 is stuck in a step for 12 s"


def test_ranks_that_all_wait_for_each_other() -> None:
    watched = monitor()
    for _ in range(6):
        beat(watched, 0, 1, 2)
        found = reason(watched, 2.0)
    assert found.startswith("all ranks wait for each other for 12 s, in different exchanges")


def test_start_up_in_which_all_ranks_wait_has_its_own_limit() -> None:
    """Connecting is a wait on all ranks at once, and slow on a busy machine."""
    watched = monitor()
    for seconds in (12, 24, 36):
        for _ in range(6):
            beat(watched, 0, 1, 2, limit=30.0)
            found = reason(watched, 2.0)
        assert found.startswith("all ranks wait for each other") == (seconds > 30)


def test_a_rank_that_waits_for_one_that_has_left() -> None:
    watched = monitor()
    watched.heartbeats[2].has_left = True
    for _ in range(4):
        beat(watched, 1, limit=0.0)
        watched.add_seconds(1.5)
        verdict = watched.verdict(1.5, is_leaving=False)
    text = "rank 2 has left the job while rank 1 waits for it: all ranks must make the same calls"
    assert verdict == Verdict(text, with_stacks=False)


def test_ranks_that_delay_the_start_are_named_every_30_seconds() -> None:
    watched = monitor()
    named = []
    for _ in range(62):
        beat(watched, 0, 1)
        named.append(watched.slow_to_start(1.0))
    assert [second for second, ranks in enumerate(named, 1) if ranks == [2]] == [31, 62]
    beat(watched)
    assert not watched.slow_to_start(40.0)


class Work:
    """An exchange that records the state of its mark."""

    def __init__(self, mark: ExchangeMark) -> None:
        self.mark, self.was_active = mark, False

    def wait(self) -> None:
        self.was_active = self.mark.is_active


def test_waiting_for_a_pending_exchange_is_marked() -> None:
    mark = ExchangeMark()
    work = Work(mark)
    received = torch.ones(2)
    pending = Pending(received, torch.device("cpu"), work.wait, None, mark)
    assert not mark.is_active
    assert torch.equal(pending.wait(), received)
    assert work.was_active and not mark.is_active
