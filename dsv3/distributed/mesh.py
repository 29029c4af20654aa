"""Process groups of the world: one mesh of dp x tp ranks, tp fastest.

`join_world` reads rank and world size from the launcher's environment (without a launcher, a world
of one), runs the rendezvous, chooses device and backend, and makes the groups.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import Collectives, SingleRank
from dsv3.distributed.cpu_exchange import CPU_EXCHANGES, connect_cpu
from dsv3.distributed.heartbeat import start_up_timeout
from dsv3.distributed.launcher import (
    environment_local_rank,
    environment_rank,
    environment_world_size,
    rendezvous_address,
    unused_tasks,
)
from dsv3.distributed.one_shot_group import connect
from dsv3.distributed.rendezvous import Hello, Peer, Roster, gather_roster
from dsv3.distributed.watchdog import RUN, Watchdog
from dsv3.errors import ConfigError, RankError
from dsv3.setting_names import SettingName, argument
from dsv3.version import __version__

log = logging.getLogger(__name__)

# Rank 0 may wait for a user's next line for days while the others wait for its plan. The watchdog
# detects ranks that die or hang.
_IDLE = timedelta(days=365)
# Seconds. The operating system's timers have a limit somewhat above.
_MIN_TIMEOUT = 3
_MAX_TIMEOUT = 1_000_000
# For a rank that cannot start to reach rank 0 and report the reason.
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Mesh:
    """This rank's layout, device and process groups.

    Attributes:
        layout: parallel sizes and this rank's coordinates.
        device: of this rank.
        world: all ranks.
        tp: this rank's tensor-parallel group.
        control: all ranks, from host memory, for step plans. Idle ranks wait on it; over NCCL this
            would keep a core and a kernel of every rank busy.
        ranks_on_host: ranks of this host.
        dp: the ranks with the same tp rank in all tp groups.
        host: the ranks of this host, if there are several dp groups and all hosts have the same
            number of several ranks; else this rank alone. For the dispatch in two stages.
        hosts: the ranks with the same index on all hosts, under the same condition.
        host_of_rank: index of each rank's host; hosts are in the order of their first ranks.
        watchdog: of this job.
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
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def groups(self) -> list[Collectives]:
        """All groups, without duplicates."""
        groups = (self.world, self.tp, self.control, self.dp, self.host, self.hosts)
        return list({id(group): group for group in groups}.values())

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank had to send to others so far, including step plans."""
        return sum(group.sent.total() for group in self.groups)

    def close(self) -> None:
        """Drop the references to all process groups, before they are destroyed."""
        for group in self.groups:
            group.close()

    @property
    def is_capturable(self) -> bool:
        """True if CUDA graphs can contain a step with its exchanges."""
        groups = self.world, self.tp, self.dp, self.host, self.hosts
        return self.device.type == "cuda" and all(group.is_capturable for group in groups)


def _device_kind(name: str) -> str:
    """Return "cpu" or "cuda"; "auto" is CUDA if available."""
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


def make_mesh(
    layout: ParallelConfig,
    device: torch.device,
    backend: str,
    via_host: bool,
    host_of_rank: Sequence[int],
    watchdog: Watchdog | None = None,
    one_shot: bool = False,
    cpu_exchange: str = "auto",
) -> Mesh:
    """Make the groups of a world of several ranks, after the rendezvous. A collective.

    Args:
        layout: parallel sizes and this rank's coordinates.
        device: this rank's.
        backend: "nccl" or "gloo".
        via_host: see `ProcessGroup`.
        host_of_rank: see `Mesh`.
        watchdog: counts exchanges as progress.
        one_shot: see `connect`.
        cpu_exchange: see `join_world`.
    """
    assert dist.group.WORLD is not None
    host_of_rank = tuple(host_of_rank)
    watchdog = watchdog or Watchdog()
    ranks_on_host = host_of_rank.count(host_of_rank[layout.rank])

    def connected(group: dist.ProcessGroup, device: torch.device = device) -> Collectives:
        with watchdog.waiting():
            if device.type == "cpu":
                return connect_cpu(group, cpu_exchange, host_of_rank)
            return connect(
                group, device, via_host=via_host, ranks_on_host=ranks_on_host, one_shot=one_shot
            )

    world = connected(dist.group.WORLD)
    control = world
    if backend == "nccl":
        gloo = dist.new_group(backend="gloo", timeout=_IDLE)
        control = connected(gloo, torch.device("cpu"))
    kind = "cuda" if backend == "nccl" else "cpu"

    def grid(*axes: tuple[str, int]) -> list[Collectives]:
        """Return this rank's group along each axis."""
        names, sizes = zip(*axes, strict=True)
        if max(sizes) == world.size:
            return [world if size > 1 else SingleRank() for size in sizes]
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
        return [connected(mesh.get_group(name)) for name in names]

    dp, tp = grid(("dp", layout.dp), ("tp", layout.tp))
    host: Collectives = SingleRank()
    hosts: Collectives = SingleRank()
    is_even = host_of_rank == tuple(rank // ranks_on_host for rank in range(world.size))
    if layout.dp > 1 and is_even and world.size % ranks_on_host == 0:
        hosts, host = grid(("hosts", world.size // ranks_on_host), ("host", ranks_on_host))
    mesh = Mesh(
        layout=layout,
        device=device,
        world=world,
        tp=tp,
        control=control,
        ranks_on_host=ranks_on_host,
        dp=dp,
        host=host,
        hosts=hosts,
        host_of_rank=host_of_rank,
        watchdog=watchdog,
    )
    groups = mesh.groups
    watchdog.counters.append(lambda: sum(group.num_calls for group in groups))
    watchdog.in_exchange = lambda: any(group.in_exchange for group in groups)
    return mesh


@contextmanager
def before_joining() -> Iterator[None]:
    """Check settings before `join_world`: report an error to the other ranks, so none waits.

    Raises:
        ConfigError: on all ranks, a setting of one rank is wrong. If the others cannot be reached,
            on this rank alone.
    """
    try:
        yield
    except ConfigError as error:
        world_size = environment_world_size()
        if world_size > 1:
            hello = Hello(Peer.here(environment_rank()), world_size, failure=str(error))
            with suppress(RankError):
                _report_failure(hello)
        raise


def _report_failure(hello: Hello) -> None:
    """Report an error to the other ranks; the roster raises it again, without its context."""
    try:
        gather_roster(hello, _REPORT_SECONDS)
    except ConfigError as error:
        raise error.with_traceback(None) from None


def _check_settings(
    device: str, tp: int, dp: int, rank_timeout: float, name: SettingName, cpu_exchange: str
) -> ParallelConfig:
    """Return the layout.

    Raises:
        ConfigError: a setting or a variable of the launcher is wrong.
    """
    rank = environment_rank()
    world_size = environment_world_size()
    environment_local_rank()  # raises if it is invalid
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{name('device')}={device} is unknown; use auto, cpu or cuda")
    if cpu_exchange not in CPU_EXCHANGES:
        words = ", ".join(CPU_EXCHANGES)
        raise ConfigError(f"{name('cpu_exchange')}={cpu_exchange} is unknown; use one of {words}")
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
    one_shot: bool = False,
    around: Callable[[Watchdog], AbstractContextManager[object]] = nullcontext,
    cpu_exchange: str = "auto",
) -> Iterator[Mesh]:
    """Join the world for the duration of the block, and leave it in order at its end.

    In a world of several, an error that is not raised on all ranks ends the program on all ranks.

    Args:
        device: "auto" (CUDA if available), "cpu" or "cuda".
        tp: tensor-parallel ranks; 0 for world size / dp.
        dp: data-parallel groups.
        rank_timeout: seconds after which a rank that hangs ends the job.
        settings: names and values of other settings that must be the same on all ranks.
        name: returns the name of a setting in error messages.
        one_shot: see `connect`.
        around: a program's context around its part in the job, in which its signal handlers call
            the watchdog; entered before the groups are made.
        cpu_exchange: exchange of CPU tensors: "memory" within a host and Gloo between hosts; "gloo"
            everywhere; "auto" as "memory", but Gloo where the ranks cannot share memory.

    Raises:
        ConfigError: the layout does not fit the world, there is no such device, or the ranks were
            started in different ways.
        RankError: the other ranks cannot be reached.
    """
    with before_joining():
        layout = _check_settings(device, tp, dp, rank_timeout, name, cpu_exchange)
    if tasks := unused_tasks():
        log.info("alone in a Slurm job of %d tasks: srun starts a rank for each", tasks)
    roster = None
    if layout.world_size > 1:
        rendezvous_address()
        common = {"tp": layout.tp, "dp": layout.dp, "device": _device_kind(device)}
        common |= settings or {}
        named = {name(field): str(value) for field, value in common.items()}
        named["the version of dsv3"] = __version__
        hello = Hello(Peer.here(layout.rank), layout.world_size, named)
        roster = gather_roster(hello, start_up_timeout(rank_timeout))
    watchdog = Watchdog(layout.rank, roster, rank_timeout)
    watchdog.start()
    mesh = None
    try:
        with around(watchdog), watchdog.membership():
            mesh = _enter_mesh(
                layout, device, roster, watchdog, one_shot=one_shot, cpu_exchange=cpu_exchange
            )
            watchdog.enter(RUN, may_rest=True)
            yield mesh
    finally:
        if roster and dist.is_initialized():
            with watchdog.closing():
                if mesh is not None:
                    mesh.close()
                elif error := sys.exception():  # its frames refer to groups
                    traceback.clear_frames(error.__traceback__)
                dist.destroy_process_group()


def _enter_mesh(
    layout: ParallelConfig,
    device_name: str,
    roster: Roster | None,
    watchdog: Watchdog,
    one_shot: bool,
    cpu_exchange: str,
) -> Mesh:
    """Choose this rank's device and make its groups."""
    rank = layout.rank
    peers = roster.peers if roster else ()
    hosts = [(peer.host, peer.boot) for peer in peers] or [("", "")]
    # Several torchrun agents of a host may show different devices to their ranks.
    device_sets = [(peer.host, peer.boot, peer.gpus) for peer in peers] or [("", "", "")]
    device = _pick_device(device_name, device_sets[:rank].count(device_sets[rank]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if roster is None:
        alone = SingleRank()
        return Mesh(layout, device, alone, alone, alone, 1, watchdog=watchdog)
    is_cuda = device.type == "cuda"
    is_shared_gpu = is_cuda and device_sets.count(device_sets[rank]) > torch.cuda.device_count()
    backend = "nccl" if is_cuda and not is_shared_gpu else "gloo"
    roster.store.set_timeout(_IDLE)
    excepthook = sys.excepthook
    with watchdog.waiting():
        dist.init_process_group(
            backend,
            store=roster.store,
            rank=layout.rank,
            world_size=layout.world_size,
            timeout=_IDLE,
        )
    sys.excepthook = excepthook  # torch has replaced it
    distinct_hosts = list(dict.fromkeys(hosts))
    return make_mesh(
        layout,
        device,
        backend,
        via_host=is_shared_gpu,
        host_of_rank=[distinct_hosts.index(host) for host in hosts],
        watchdog=watchdog,
        one_shot=one_shot,
        cpu_exchange=cpu_exchange,
    )
