"""Process groups of the world: one mesh of dp x tp ranks, tp fastest.

`join_world` takes this process's place from its launcher (without one, a world of one), meets the
other ranks, picks device and backend, and hands out the groups.
"""

import ctypes
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import Collectives, ProcessGroup, SingleRank, connect
from dsv3.distributed.launcher import (
    environment_local_rank,
    environment_rank,
    environment_world_size,
    meeting_point,
    unused_tasks,
)
from dsv3.distributed.rendezvous import Hello, Peer, Roster, meet
from dsv3.distributed.watchdog import RUN, Watchdog, start_up_timeout
from dsv3.errors import ConfigError, RankError
from dsv3.setting_names import SettingName, argument
from dsv3.version import __version__

log = logging.getLogger(__name__)

# Rank 0 may wait for a user's next line for days while the others wait for its plan. The watch
# notices ranks that die or hang.
_IDLE = timedelta(days=365)
_MIN_TIMEOUT, _MAX_TIMEOUT = 3, 1_000_000  # seconds; the system's timers end somewhere above
# That a rank which cannot start waits for rank 0, to tell it.
_TELL_SECONDS = 10.0
# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Mesh:
    """This rank's place: its layout, its device and the groups it exchanges with.

    `control` reaches the whole world from host memory: plans travel on it. Ranks wait on it
    without work to do, which over NCCL would keep a core and a kernel of every rank busy.
    `dp` holds the ranks at the same place of every tp group. Where hosts of equal size hold several
    ranks each, `host` holds the ranks of this one and `hosts` those at the same place of every one.
    `host_of_rank` numbers the hosts in the order of their first ranks.
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
    host_of_rank: tuple[int, ...] = (0,)
    watch: Watchdog = field(default_factory=Watchdog)

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
        """Whether CUDA graphs can hold a step, its exchanges included."""
        groups = self.world, self.tp, self.dp, self.host, self.hosts
        return self.device.type == "cuda" and all(group.is_capturable for group in groups)


def _device_kind(name: str) -> str:
    """Return "cpu" or "cuda"; "auto" is CUDA where present."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _pick_device(device: str, local_rank: int) -> torch.device:
    """Return the device of this rank; more ranks than GPUs on a host share them."""
    if _device_kind(device) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("the device is cuda but torch finds no CUDA device; use cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _num_threads(ranks_on_host: int) -> int:
    """Return what OMP_NUM_THREADS says, else this rank's share of the cores it may use.

    torchrun sets it to 1 where the user has not; its own environment tells.
    """
    with suppress(OSError):
        parents = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        is_users = any(entry.startswith(b"OMP_NUM_THREADS=") for entry in parents)
        if "TORCHELASTIC_RUN_ID" in os.environ and not is_users:
            os.environ.pop("OMP_NUM_THREADS", None)
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    usable = getattr(os, "sched_getaffinity", None)
    return max(1, (len(usable(0)) if usable else os.cpu_count() or 1) // ranks_on_host)


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
    layout: ParallelConfig,
    device: torch.device,
    backend: str,
    via_host: bool,
    host_of_rank: Sequence[int],
    watch: Watchdog | None = None,
) -> Mesh:
    """Make the groups of a world of several that has met. A collective."""
    assert dist.group.WORLD is not None
    host_of_rank, watch = tuple(host_of_rank), watch or Watchdog()
    ranks_on_host = host_of_rank.count(host_of_rank[layout.rank])
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
    is_even = host_of_rank == tuple(rank // ranks_on_host for rank in range(world.size))
    if layout.dp > 1 and is_even and world.size % ranks_on_host == 0:
        hosts, host = grid(("hosts", world.size // ranks_on_host), ("host", ranks_on_host))
    places = ranks_on_host, dp, host, hosts, host_of_rank
    mesh = Mesh(layout, device, world, tp, control, *places, watch)
    groups = [group for group in mesh.groups if isinstance(group, ProcessGroup)]
    watch.counters.append(lambda: sum(group.num_calls for group in groups))
    return mesh


@contextmanager
def before_joining() -> Iterator[None]:
    """Check settings before `join_world`: the other ranks hear of an error, and do not wait.

    Raises:
        ConfigError: on every rank, a setting of one is wrong. If the others cannot be reached, on
            this rank alone.
    """
    try:
        yield
    except ConfigError as error:
        rank, world_size = environment_rank(), environment_world_size()
        if world_size > 1:
            with suppress(RankError):
                meet(Hello(Peer.here(rank), world_size, failure=str(error)), _TELL_SECONDS)
        raise


def _check_settings(
    device: str, tp: int, dp: int, rank_timeout: float, name: SettingName
) -> ParallelConfig:
    """Return the layout."""
    rank, world_size = environment_rank(), environment_world_size()
    environment_local_rank()  # wrong ones are refused here
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{name('device')}={device} is unknown; use auto, cpu or cuda")
    if not _MIN_TIMEOUT <= rank_timeout <= _MAX_TIMEOUT:
        raise ConfigError(
            f"{name('rank_timeout')}={rank_timeout:g} must be at least {_MIN_TIMEOUT} seconds, "
            f"and at most {_MAX_TIMEOUT:,}"
        )
    if world_size > 1 and dist.is_initialized():
        raise ConfigError(
            "torch.distributed is in use in this process: close the LLM that was made before, or "
            "destroy the script's own process group"
        )
    return ParallelConfig(world_size=world_size, rank=rank, tp=tp, dp=dp)


@contextmanager
def join_world(
    device: str = "auto",
    tp: int = 0,
    dp: int = 1,
    rank_timeout: float = 60.0,
    settings: Mapping[str, str] | None = None,
    name: SettingName = argument,
) -> Iterator[Mesh]:
    """Meet the other ranks; leave them cleanly at the end.

    In a world of several, an error that not every rank has met with ends the program on all.

    Args:
        device: "auto" (CUDA where present), "cpu" or "cuda".
        tp: tensor-parallel ranks; 0 takes all that dp leaves.
        dp: data-parallel groups.
        rank_timeout: seconds after which a rank that hangs ends the job.
        settings: names and values of all else that must be the same on all ranks.
        name: how errors call a setting.

    Raises:
        ConfigError: the layout does not fit the world, there is no such device, or the ranks were
            started in different ways.
        RankError: the other ranks cannot be reached.
    """
    with before_joining():
        layout = _check_settings(device, tp, dp, rank_timeout, name)
    rank, world_size, met = layout.rank, layout.world_size, None
    if tasks := unused_tasks():
        log.info("alone in a Slurm job of %d tasks: srun starts a rank for each", tasks)
    if world_size > 1:
        meeting_point()
        places = {"tp": layout.tp, "dp": layout.dp, "device": _device_kind(device)}
        same = {name(field): str(value) for field, value in {**places, **(settings or {})}.items()}
        common = same | {"the version of dsv3": __version__}
        met = meet(Hello(Peer.here(rank), world_size, common), start_up_timeout(rank_timeout))
    watch = Watchdog(rank, met, rank_timeout)
    watch.start()
    mesh = None
    try:
        mesh = _enter_mesh(layout, device, met, watch)
        watch.enter(RUN, may_rest=True)
        yield mesh
    except BaseException as error:
        watch.leave(error)
        raise
    else:
        watch.leave()
    finally:
        if met and mesh:
            with watch.closing():
                mesh.close()
                dist.destroy_process_group()


def _enter_mesh(layout: ParallelConfig, device: str, met: Roster | None, watch: Watchdog) -> Mesh:
    """Choose this rank's device and make its groups."""
    rank, peers = layout.rank, met.peers if met else ()
    hosts = [(peer.host, peer.boot) for peer in peers] or [("", "")]
    order, ranks_on_host = list(dict.fromkeys(hosts)), hosts.count(hosts[rank])
    # Of several agents on a host, each may let its ranks see other devices.
    sights = [(peer.host, peer.boot, peer.gpus) for peer in peers] or [("", "", "")]
    place = _pick_device(device, sights[:rank].count(sights[rank]))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(_num_threads(ranks_on_host))
        _keep_freed_memory()
    if met is None:
        alone = SingleRank()
        return Mesh(layout, place, alone, alone, alone, 1, watch=watch)
    is_cuda = place.type == "cuda"
    shared_gpu = is_cuda and sights.count(sights[rank]) > torch.cuda.device_count()
    backend = "nccl" if is_cuda and not shared_gpu else "gloo"
    met.store.set_timeout(_IDLE)
    with watch.waiting():
        dist.init_process_group(
            backend, store=met.store, rank=layout.rank, world_size=layout.world_size, timeout=_IDLE
        )
    host_of_rank = [order.index(host) for host in hosts]
    return make_mesh(layout, place, backend, shared_gpu, host_of_rank, watch)
