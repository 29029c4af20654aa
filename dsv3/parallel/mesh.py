"""Process groups of the world: one mesh of dp x tp ranks, tp fastest.

`join_world` reads torchrun's environment (without it, a world of one), picks device and backend,
and hands out the groups. Nothing else in the project reads a rank from the environment.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv3.config import ParallelConfig
from dsv3.errors import ConfigError, RankError
from dsv3.parallel.collectives import Collectives, ProcessGroup, SingleRank, connect

# Rank 0 may wait for a user's next line for days while the others wait for its plan. A dead rank
# is noticed by its closed connection, and torchrun ends the rest.
_IDLE = timedelta(days=365)
# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Mesh:
    """This rank's place: its layout, its device and the groups it exchanges with.

    `control` reaches the whole world from host memory: plans travel on it. Ranks wait on it
    without work to do, which over NCCL would keep a core and a kernel of every rank busy.
    `dp` holds the ranks at the same place of every tp group. Where hosts of equal size hold several
    ranks each, `host` holds the ranks of this one and `hosts` those at the same place of every one.
    """

    layout: ParallelConfig
    device: torch.device
    world: Collectives
    tp: Collectives
    control: Collectives
    ranks_on_host: int
    dp: Collectives = field(default_factory=SingleRank)
    host: Collectives = field(default_factory=SingleRank)
    hosts: Collectives = field(default_factory=SingleRank)

    @property
    def groups(self) -> list[Collectives]:
        """The groups, each once."""
        every = (self.world, self.tp, self.control, self.dp, self.host, self.hosts)
        return list({id(group): group for group in every}.values())

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank had to send to others so far, plans included."""
        return sum(group.sent.total() for group in self.groups)

    def close(self) -> None:
        """Let go of all groups."""
        for group in self.groups:
            if isinstance(group, ProcessGroup):
                group.close()

    @property
    def is_capturable(self) -> bool:
        """Whether CUDA graphs can hold a step of one group, its exchanges included."""
        return self.device.type == "cuda" and self.tp.is_capturable and self.layout.dp == 1


def environment_rank() -> int:
    """Return this process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def _pick_device(name: str, local_rank: int) -> torch.device:
    """Return the device of this rank; more ranks than GPUs on a host share them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ConfigError(f"--device={name} is unknown; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ConfigError("--device=cuda but torch finds no CUDA device; use --device cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next step, not return it to the system.

    Faulting a step's temporaries in anew costs a quarter of a prefill of 2048 tokens on the demo
    model. Only glibc has this function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def make_mesh(
    layout: ParallelConfig, device: torch.device, backend: str, via_host: bool, ranks_on_host: int
) -> Mesh:
    """Make the groups of a world of several that has met. A collective."""
    assert dist.group.WORLD is not None
    world = connect(dist.group.WORLD, device, via_host, ranks_on_host)
    control = world
    if backend == "nccl":
        control = ProcessGroup(dist.new_group(backend="gloo", timeout=_IDLE))
    kind = "cuda" if backend == "nccl" else "cpu"

    def grid(*axes: tuple[str, int]) -> list[Collectives]:
        """Return this rank's group along each axis."""
        names, sizes = zip(*axes, strict=True)
        if max(sizes) == world.size:
            return [world if size > 1 else SingleRank() for size in sizes]
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
        return [connect(mesh.get_group(n), device, via_host, ranks_on_host) for n in names]

    dp, tp = grid(("dp", layout.dp), ("tp", layout.tp))
    host: Collectives = SingleRank()
    hosts: Collectives = SingleRank()
    here = torch.tensor([ranks_on_host], device=device)
    everywhere = set(world.all_gather(here).flatten().tolist())
    if layout.dp > 1 and len(everywhere) == 1 and world.size % ranks_on_host == 0:
        hosts, host = grid(("hosts", world.size // ranks_on_host), ("host", ranks_on_host))
    return Mesh(layout, device, world, tp, control, ranks_on_host, dp, host, hosts)


@contextmanager
def join_world(device: str = "auto", tp: int = 0, dp: int = 1) -> Iterator[Mesh]:
    """Meet the other ranks; leave them cleanly at the end.

    Args:
        device: "auto" (CUDA where present), "cpu" or "cuda".
        tp: tensor-parallel ranks; 0 takes all that dp leaves.
        dp: data-parallel groups.

    Raises:
        ConfigError: the layout does not fit the world, or there is no such device.
        RankError: the other ranks cannot be reached.
    """
    rank = environment_rank()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    layout = ParallelConfig(world_size=world_size, rank=rank, tp=tp, dp=dp)
    place = _pick_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_on_host))
        _keep_freed_memory()
    if world_size == 1:
        yield Mesh(layout, place, SingleRank(), SingleRank(), SingleRank(), 1)
        return
    shared_gpu = place.type == "cuda" and ranks_on_host > torch.cuda.device_count()
    backend = "nccl" if place.type == "cuda" and not shared_gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=_IDLE)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} cannot join the world of {world_size}: {error}") from error
    mesh = make_mesh(layout, place, backend, shared_gpu, ranks_on_host)
    try:
        yield mesh
    finally:
        mesh.close()
        dist.destroy_process_group()
