"""Choice of the exchange of CPU tensors: shared memory within a host, Gloo between hosts."""

import errno
import logging
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dsv3.distributed.collectives import Collectives, ProcessGroup
from dsv3.distributed.shared_memory import MemoryGroup
from dsv3.distributed.shared_rounds import Rounds
from dsv3.distributed.shared_segment import (
    SegmentHandle,
    SharedSegment,
    create_file,
    handle_of,
    open_file,
)
from dsv3.errors import ConfigError

log = logging.getLogger(__name__)

CPU_EXCHANGES = ("auto", "memory", "gloo")


def connect_cpu(
    group: dist.ProcessGroup, cpu_exchange: str, host_of_rank: Sequence[int]
) -> Collectives:
    """Return the implementation for CPU tensors of a Gloo group. A collective.

    Args:
        group: a subset of the world.
        cpu_exchange: one of `CPU_EXCHANGES`.
        host_of_rank: index of the host of each rank of the world.

    Raises:
        ConfigError: on all ranks of the group, memory was asked for and cannot be shared.
    """
    ranks = dist.get_process_group_ranks(group)
    hosts = {host_of_rank[rank] for rank in ranks}
    if cpu_exchange == "gloo" or len(ranks) == 1 or len(hosts) > 1:
        return ProcessGroup(group)
    try:
        segment = share_segment(group)
    except OSError as error:
        if cpu_exchange == "memory":
            refusal = ConfigError(
                f"the ranks of a host cannot share memory ({error.strerror}), as the CPU exchange "
                "`memory` requires; use auto or gloo"
            )
            refusal.seen_by_all_ranks = len(ranks) == len(host_of_rank)
            refusal.reported_by_rank0 = refusal.seen_by_all_ranks and dist.get_rank() != 0
            raise refusal from None
        if dist.get_rank(group) == 0:
            log.warning(
                "the ranks exchange over Gloo, which is slower: they cannot share memory (%s)",
                error.strerror,
            )
        return ProcessGroup(group)
    num_ranks = host_of_rank.count(host_of_rank[ranks[0]])
    num_cores = len(os.sched_getaffinity(0))
    return MemoryGroup(Rounds(segment, ranks, dist.get_rank(group), num_ranks > num_cores))


def share_segment(group: dist.ProcessGroup) -> SharedSegment:
    """Make a segment, and map it on all ranks of a group. A collective.

    Raises:
        OSError: on all ranks, with the highest error number of any rank.
    """
    rank = dist.get_rank(group)
    size = dist.get_world_size(group)
    descriptor = -1
    segment = None
    failure = 0
    handle = torch.zeros(len(SegmentHandle._fields), dtype=torch.int64)
    try:
        if rank == 0:
            descriptor = create_file(size)
            handle = torch.tensor(handle_of(descriptor))
    except OSError as error:
        failure = error.errno or errno.EIO
    dist.broadcast(handle, group=group, group_src=0)
    try:
        if rank and handle.any():
            descriptor = open_file(SegmentHandle(*handle.tolist()))
        if descriptor >= 0:
            segment = SharedSegment(descriptor, rank, size)
    except OSError as error:
        failure = error.errno or errno.EIO
    worst = torch.tensor(failure)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    if descriptor >= 0:
        os.close(descriptor)
    if segment is None or worst:
        raise OSError(int(worst), os.strerror(int(worst)))
    return segment
