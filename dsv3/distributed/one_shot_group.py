"""Sums over the GPUs of one host, in memory that they share. Opt-in: not yet confirmed on GPUs."""

import logging
from importlib import import_module

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.distributed.collectives import ProcessGroup
from dsv3_kernels import Peers, shared_bytes

log = logging.getLogger(__name__)

# Above this size NCCL is faster. Calculated (8 ranks read 3.5 MiB at 450 GB/s in 8 us), not
# measured.
_ONE_SHOT_BYTES = 512 << 10
_ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)


class OneShotGroup(ProcessGroup):
    """GPUs of one host that read each other's memory: a small sum is one kernel, without NCCL.

    For few rows the same kernel also adds and normalizes (`sum_norm`, in separate memory). Every
    rank reads all parts: more bytes than a ring (size - 1 times x), but less latency. No rank may
    call `share` before all have made their group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group)
        self._device = device
        self._symmetric = import_module("torch.distributed._symmetric_memory")
        self._name = group.group_name
        self._add = torch.ops.symm_mem.one_shot_all_reduce_copy
        num_bytes = _ONE_SHOT_BYTES + shared_bytes(self.size)
        self._shared = self._symmetric.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)  # a peer may write right after the rendezvous

    def share(self) -> None:
        """Map the memory of all ranks. A collective."""
        handle = self._symmetric.rendezvous(self._shared, self.group)
        offset = self._shared[_ONE_SHOT_BYTES:].data_ptr() - handle.buffer_ptrs[self.rank]
        addresses = [pointer + offset for pointer in handle.buffer_ptrs]
        self.peers = Peers.at(addresses, self.rank, self._device)

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.nbytes > _ONE_SHOT_BYTES or x.nbytes % 16 or x.dtype not in _ONE_SHOT_DTYPES:
            return super().all_reduce(x)
        self.sent["all_reduce"] += (self.size - 1) * x.nbytes
        self.num_calls += 1
        shared = self._shared[: x.nbytes].view(x.dtype)
        return self._sum(shared, x.contiguous().flatten()).view(x.shape)

    def _sum(self, shared: Tensor, x: Tensor) -> Tensor:
        return self._add(shared, x, "sum", self._name)


def connect(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    via_host: bool,
    ranks_on_host: int,
    one_shot: bool,
) -> ProcessGroup:
    """Return the same implementation on all ranks of a group. A collective.

    Args:
        group: a subset of the world, in which each host has `ranks_on_host` consecutive ranks.
        device: this rank's.
        via_host: see `ProcessGroup`.
        ranks_on_host: ranks of this host.
        one_shot: sum in memory that all ranks of the group share, if they can.
    """
    ranks = dist.get_process_group_ranks(group)
    is_one_host = len({rank // ranks_on_host for rank in ranks}) == 1
    is_local = device.type == "cuda" and not via_host and is_one_host and len(ranks) > 1
    shared = _one_shot_group(group, device) if one_shot and is_local else None
    return shared or ProcessGroup(group, via_host)


def _one_shot_group(group: dist.ProcessGroup, device: torch.device) -> OneShotGroup | None:
    """Return a group that sums in shared memory; None if any rank cannot. A collective.

    The first rank that cannot names its reason.
    """
    made: list[OneShotGroup] = []

    def allocate() -> None:
        others = [i for i in range(torch.cuda.device_count()) if i != device.index]
        if not all(torch.cuda.can_device_access_peer(device, i) for i in others):
            raise RuntimeError("its GPU cannot read the memory of the others")
        made.append(OneShotGroup(group, device))

    for stage in (allocate, lambda: made[0].share()):
        reason = None
        try:
            stage()
        except (AttributeError, RuntimeError) as error:  # not supported by this torch or machine
            reason = str(error).split("\n")[0]
        failed = _first_failed(group, device, reason is not None)
        if failed == dist.get_rank(group):
            log.warning("no one-shot sums, all ranks go on with NCCL: %s", reason)
        if failed is not None:
            return None
    return made[0]


def _first_failed(group: dist.ProcessGroup, device: torch.device, has_failed: bool) -> int | None:
    """Return the first rank of a group that has failed; None if all are well. A collective."""
    size = dist.get_world_size(group)
    first = torch.tensor(dist.get_rank(group) if has_failed else size, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    rank = int(first)
    return rank if rank < size else None
