"""Several ranks on one machine, without torchrun and without a port."""

import faulthandler
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypedDict

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.cpu_exchange import connect_cpu
from dsv3.distributed.mesh import Mesh
from tests.forked import fork_server

CPU = torch.device("cpu")
_CHECK_SECONDS = 300  # a rank that takes longer hangs: it prints its stack and exits
Check = Callable[[Mesh], None]


class RankFailure(AssertionError):
    """A rank failed a check; the text is the rank's traceback."""


class Failure(TypedDict):
    """The failure of a check on one rank; `time` orders the failures of several ranks."""

    time: float
    rank: int
    traceback: str


class Outcomes:
    """Outcome of every check: a failure or None for each rank."""

    def __init__(self, ranks: list[dict[str, Failure | None]]) -> None:
        self._ranks = ranks

    def verify(self, name: str) -> None:
        """Raise the traceback of the rank that failed the check first, if any rank did.

        The other ranks often fail after it, because it has left their exchange.
        """
        outcomes = [outcome_of[name] for outcome_of in self._ranks]
        failures = [outcome for outcome in outcomes if outcome is not None]
        if failures:
            first = min(failures, key=lambda failure: failure["time"])
            ranks = [failure["rank"] for failure in failures]
            raise RankFailure(
                f"{name}: failed on ranks {ranks}, on rank {first['rank']} first:\n"
                + first["traceback"]
            )


def run_checks(
    checks: Mapping[str, Check], world_size: int, cpu_exchange: str = "memory"
) -> Outcomes:
    """Run every check in the same `world_size` processes.

    Every check has process groups of its own. Over Gloo a failure does not affect the next check:
    the rank that fails closes its groups, and the others fail in their next exchange with it. In
    memory they would wait for it, so the first failure ends all ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        fork_server()
        mp.start_processes(
            _rank_main,
            args=(checks, world_size, cpu_exchange, Path(folder)),
            nprocs=world_size,
            start_method="forkserver",
        )
        files = [Path(folder, f"{rank}.json") for rank in range(world_size)]
        return Outcomes([json.loads(file.read_text()) for file in files])


def run_ranks(check: Callable[..., None], world_size: int, **settings: object) -> None:
    """Run `check(mesh, **settings)` in `world_size` processes; raise the first failure."""
    name = check.__name__
    run_checks({name: partial(check, **settings)}, world_size).verify(name)


def _rank_main(
    rank: int, checks: Mapping[str, Check], world_size: int, cpu_exchange: str, folder: Path
) -> None:
    torch.set_num_threads(1)
    file_store = dist.FileStore(str(folder / "store"), world_size)
    layout = ParallelConfig(world_size=world_size, rank=rank)
    outcome_of: dict[str, Failure | None] = {}
    for number, (name, check) in enumerate(checks.items()):
        faulthandler.dump_traceback_later(_CHECK_SECONDS, exit=True)
        store = dist.PrefixStore(str(number), file_store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        _wait_for_all(store, "start", layout)
        assert dist.group.WORLD is not None
        group = connect_cpu(dist.group.WORLD, cpu_exchange, [0] * world_size)
        outcome = _outcome(check, Mesh(layout, CPU, group, group, group, world_size))
        if outcome is not None and cpu_exchange == "memory":
            raise RankFailure(f"{name}: failed on rank {rank}:\n{outcome['traceback']}")
        if outcome is None:  # other ranks may still be in an exchange with this one
            _wait_for_all(store, "end", layout)
        group.close()
        dist.destroy_process_group()
        if outcome is not None:
            _wait_for_all(store, "end", layout)
        outcome_of[name] = outcome
        faulthandler.cancel_dump_traceback_later()
    (folder / f"{rank}.json").write_text(json.dumps(outcome_of))


def _outcome(check: Check, mesh: Mesh) -> Failure | None:
    try:
        with torch.inference_mode():
            check(mesh)
    except (Exception, pytest.fail.Exception) as error:
        text = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)  # they refer to groups
        return Failure(time=time.monotonic(), rank=mesh.world.rank, traceback=text)
    return None


def _wait_for_all(store: dist.Store, event: str, layout: ParallelConfig) -> None:
    store.set(f"{event} {layout.rank}", "")
    store.wait([f"{event} {rank}" for rank in range(layout.world_size)])


def alone() -> Mesh:
    """Return the mesh of a world of one."""
    return Mesh(ParallelConfig(), CPU, SingleRank(), SingleRank(), SingleRank(), 1)
