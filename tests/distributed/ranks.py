"""Several ranks on one machine, without torchrun and without a port."""

import multiprocessing
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import ProcessGroup, SingleRank
from dsv3.distributed.mesh import Mesh

CPU = torch.device("cpu")


def _rank_main(
    rank: int, fn: Callable[..., None], world_size: int, init: str, args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    group = ProcessGroup(dist.group.WORLD)
    try:
        layout = ParallelConfig(world_size=world_size, rank=rank)
        fn(Mesh(layout, CPU, group, group, group, world_size), *args)
    finally:
        group.close()
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., None], world_size: int, *args: object) -> None:
    """Run `fn(mesh, *args)` in `world_size` processes over gloo; raise the first failure."""
    with tempfile.TemporaryDirectory() as folder:
        init = f"file://{folder}/rendezvous"
        # The fork server imports the modules that all ranks need once.
        multiprocessing.set_forkserver_preload(["dsv3.engine.start"])
        mp.start_processes(
            _rank_main,
            args=(fn, world_size, init, args),
            nprocs=world_size,
            start_method="forkserver",
        )


def alone() -> Mesh:
    """Return the mesh of a world of one."""
    return Mesh(ParallelConfig(), CPU, SingleRank(), SingleRank(), SingleRank(), 1)
