"""Ranks that are killed or stopped at random moments within exchanges, in memory and over Gloo."""

import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from dsv3.distributed.mesh import Mesh, join_world
from tests.forked import fork_server, run_forked
from tests.programs import GENERATE, HANG_SECONDS, free_port, our_lines, run, torchrun

TIMEOUT = 3.0  # seconds, the shortest --rank-timeout
SHM = Path("/dev/shm")


Run = Callable[[Mesh, random.Random, Event], None]


def exchange_for_ever(mesh: Mesh, rng: random.Random, has_begun: Event) -> None:
    """Run exchanges of all kinds and sizes, the same ones on all ranks."""
    world, size = mesh.world, mesh.world.size
    with mesh.watchdog.step():
        while True:
            x = torch.ones(size, rng.choice([1, 100, 10_000, 300_000]))
            operation = rng.choice(["all_reduce", "all_gather", "all_to_all", "broadcast"])
            pending = world.start_exchange(x, [1] * size, [1] * size, "exchange")
            getattr(world, operation)(x)
            pending.wait()
            has_begun.set()


def wait_for_rank_0(mesh: Mesh, rng: random.Random, has_begun: Event) -> None:
    """Wait as the ranks of a chat do whose user types nothing."""
    mesh.world.all_reduce(torch.ones(1))
    has_begun.set()
    if mesh.world.rank == 0:
        time.sleep(HANG_SECONDS)
    mesh.world.broadcast(torch.ones(1))


def rank_main(
    main: Run,
    rank: int,
    size: int,
    port: int,
    cpu_exchange: str,
    has_begun: list[Event],
    log: str,
) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), 2)
    torch.set_num_threads(1)
    with join_world("cpu", rank_timeout=TIMEOUT, cpu_exchange=cpu_exchange) as mesh:
        main(mesh, random.Random(port), has_begun[rank])


class World:
    """Ranks that run a function, forked from a process that has imported everything."""

    def __init__(self, main: Run, size: int, cpu_exchange: str, log: Path) -> None:
        context = fork_server()
        has_begun = [context.Event() for _ in range(size)]
        port = free_port()
        self.log = log
        self.ranks: list[BaseProcess] = [
            context.Process(
                target=rank_main,
                args=(main, rank, size, port, cpu_exchange, has_begun, str(log)),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.ranks:
            process.start()
        assert all(each.wait(HANG_SECONDS) for each in has_begun), log.read_text()

    def end(self) -> list[int | None]:
        """Wait until all ranks have ended; return their exit codes."""
        deadline = time.monotonic() + HANG_SECONDS
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


def disturb(size: int, cpu_exchange: str, log: Path, rng: random.Random) -> None:
    """Kill or stop a rank at a random moment; all ranks must end, and name it."""
    world = World(exchange_for_ever, size, cpu_exchange, log)
    rank, number = rng.randrange(size), rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    time.sleep(rng.uniform(0, 0.05))
    os.kill(world.ranks[rank].pid or 0, number)
    codes = world.end()
    others = codes[:rank] + codes[rank + 1 :]
    assert others == [3] * (size - 1), (codes, log.read_text())
    assert codes[rank] == -signal.SIGKILL if number == signal.SIGKILL else codes[rank] is not None
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    reason = "has died during" if number == signal.SIGKILL else "is not heard of"
    # Rank 0 reports it, and one other rank, in case rank 0 cannot.
    assert errors and all(re.search(f"rank {rank} on .* {reason}", line) for line in errors)


def disturb_many(times: int, size: int, cpu_exchange: str, folder: Path) -> None:
    before = set(SHM.iterdir())
    rng = random.Random(size)
    for number in range(times):
        disturb(size, cpu_exchange, folder / f"{number}.log", rng)
    left = {path for path in set(SHM.iterdir()) - before if not path.name.startswith("sem.mp-")}
    assert not left


@pytest.mark.parametrize(("size", "cpu_exchange"), [(2, "memory"), (4, "memory"), (3, "gloo")])
def test_a_killed_or_stopped_rank_ends_all(size: int, cpu_exchange: str, tmp_path: Path) -> None:
    disturb_many(4, size, cpu_exchange, tmp_path)


@pytest.mark.slow
def test_many_kills_leave_nothing(tmp_path: Path) -> None:
    disturb_many(12, 2, "memory", tmp_path)


def cpu_seconds(process: BaseProcess) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("size", [2, 8])
def test_waiting_ranks_use_no_processor(size: int, tmp_path: Path) -> None:
    world = World(wait_for_rank_0, size, "memory", tmp_path / "log")

    def used() -> float:
        before = sum(map(cpu_seconds, world.ranks))
        time.sleep(2)
        return sum(map(cpu_seconds, world.ranks)) - before

    try:
        # Only their start may take longer, on a busy machine.
        assert any(used() < 0.05 * size for _ in range(5))
    finally:
        world.kill()


def limited(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run two ranks that cannot have shared memory: files may not be longer than 4000."""
    return run(
        [*torchrun(2), *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )


HELLO = (GENERATE, "--prompt", "Hello", "--max-new-tokens", "3")
JOIN_TWICE = """
import sys
from dsv3.distributed.mesh import join_world
from dsv3.errors import ConfigError
for exchange in ("memory", "gloo"):
    try:
        with join_world("cpu", cpu_exchange=exchange) as mesh:
            sys.stdout.write(f"{mesh.world.size} ranks\\n")
    except ConfigError:
        sys.stdout.write("refused\\n")
"""


def test_without_shared_memory_all_ranks_use_gloo() -> None:
    usual = run_forked([*HELLO], num_ranks=2)
    done = limited(*HELLO)
    assert done.returncode == usual.returncode == 0, done.stderr
    assert done.stdout == usual.stdout != ""
    lines = [line for line in our_lines(done.stderr) if "Gloo" in line]
    slow = "the ranks exchange over Gloo, which is slower: they cannot share memory"
    assert lines == [f"{slow} (File too large)"]
    assert "Gloo" not in usual.stderr

    refused = limited(*HELLO, "--cpu-exchange", "memory")
    assert refused.returncode == 1 and "exitcode  : 2" in refused.stderr
    assert [line for line in our_lines(refused.stderr) if "share memory" in line] == [
        "error: the ranks of a host cannot share memory (File too large), as the CPU exchange "
        "`memory` requires; use auto or gloo"
    ]


def test_a_world_that_was_refused_leaves_no_groups(tmp_path: Path) -> None:
    """Gloo would abort the process at its exit, now and then."""
    script = tmp_path / "join.py"
    script.write_text(JOIN_TWICE)
    done = limited(str(script))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["2 ranks", "2 ranks", "refused", "refused"]
