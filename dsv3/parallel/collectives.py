"""The only door to other ranks: layers are handed a `Collectives` and never call `dist` themselves.

Three forms: over a process group, a world of one in which nothing moves, and one rank of a world
that is not there, for measuring its share.
"""

import logging
from collections import Counter
from importlib import import_module
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_kernels import Peers, Quantized, add_rmsnorm, fits_sum_norm, shared_bytes, sum_norm

log = logging.getLogger(__name__)

# Above this NCCL is faster: by arithmetic (8 ranks read 3.5 MiB at 450 GB/s in 8 us), not measured.
_ONE_SHOT_BYTES = 512 << 10
_ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)
# torch 2.13 renamed them and warns about the old names.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Pending:
    """An exchange under way. The tensors that are sent stay alive until it is waited for."""

    def __init__(
        self,
        received: Tensor,
        device: torch.device,
        work: dist.Work | None = None,
        sent: Tensor | None = None,
    ) -> None:
        self._received, self._device, self._work, self._sent = received, device, work, sent

    def wait(self) -> Tensor:
        """Return what was received. On CUDA only the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        return self._received.to(self._device)


class Collectives(Protocol):
    """Exchanges among the `size` ranks of one group. All ranks must call in the same order.

    `sent` counts the bytes that this rank had to send to others, by operation, as calls are made
    (a CUDA graph's replays are not seen): for an all-reduce, what a ring sends.
    `is_capturable`: CUDA graphs can hold them.
    `peers`: memory of the ranks that each of them reads and writes, where there is such.
    """

    rank: int
    size: int
    sent: Counter[str]
    is_capturable: bool
    peers: Peers | None = None

    def sum_norm(
        self, x_TD: Tensor, y_TD: Tensor | None, w_D: Tensor, eps: float, quant: bool, ue8m0: bool
    ) -> tuple[Tensor, Tensor, Quantized | None]:
        """Return `add_rmsnorm` of x and the sum of y over ranks; `y_TD` may be overwritten."""
        if self.peers and y_TD is not None and fits_sum_norm(y_TD):
            self.sent["all_reduce"] += (self.size - 1) * y_TD.nbytes
            return sum_norm(x_TD, y_TD, w_D, eps, self.peers, quant=quant, ue8m0=ue8m0)
        y_TD = None if y_TD is None else self.all_reduce(y_TD)
        return add_rmsnorm(x_TD, y_TD, w_D, eps, quant=quant, ue8m0=ue8m0)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks; `x` may be overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape], the ranks' tensors in rank order."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of the r-th of `size` equal parts along dim 0, on rank r."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r; return the received parts in rank order, same shape."""
        ...

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        """Send the first send[0] rows to rank 0, and so on; get receive[r] rows from rank r.

        The bytes are counted under `name`.
        """
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's tensor; `x` is overwritten elsewhere."""
        ...


class SingleRank(Collectives):
    """A group of one: every exchange is the identity."""

    rank = 0
    size = 1
    is_capturable = True

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` as the only part."""
        return x.unsqueeze(0)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        """Return `x`, which is all for this rank."""
        assert send == receive == [len(x)], f"{send=} {receive=} {len(x)=}"
        return Pending(x, x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class ProcessGroup(Collectives):
    """Exchanges over a torch.distributed group.

    Gloo has no all-to-all of CUDA tensors: with `via_host` everything travels through host memory
    (several ranks sharing one GPU).
    """

    def __init__(self, group: dist.ProcessGroup, via_host: bool = False) -> None:
        self.group: dist.ProcessGroup | None = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._via_host = via_host
        self.sent: Counter[str] = Counter()
        self.is_capturable = dist.get_backend(group) == "nccl"
        self.num_calls = 0

    def close(self) -> None:
        """Let go of the group before it is destroyed.

        A reference that outlives `destroy_process_group` makes Gloo abort at interpreter exit
        (its threads are still running when the last one drops).
        """
        self.group = None

    def _out(self, operation: str, x: Tensor, parts: float) -> Tensor:
        """Return what is handed to the backend; this rank sends `parts` times its bytes."""
        self.sent[operation] += round(parts * x.nbytes)
        self.num_calls += 1
        return (x.cpu() if self._via_host else x).contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place where possible."""
        sent = self._out("all_reduce", x, 2 - 2 / self.size)
        dist.all_reduce(sent, group=self.group)
        return sent.to(x.device)

    def all_gather(self, x: Tensor) -> Tensor:
        """Stack the ranks' tensors."""
        sent = self._out("all_gather", x, self.size - 1)
        received = sent.new_empty((self.size * sent.shape[0], *sent.shape[1:]))
        _all_gather_single(received, sent, group=self.group)
        return received.view(self.size, *x.shape).to(x.device)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum parts over ranks. Gloo would all-reduce all of them: there, parts are exchanged."""
        if self._via_host or x.device.type == "cpu":
            return self.all_to_all(x).view(self.size, -1, *x.shape[1:]).sum(0)
        sent = self._out("reduce_scatter", x, 1 - 1 / self.size)
        received = sent.new_empty((len(sent) // self.size, *sent.shape[1:]))
        _reduce_scatter_single(received, sent, group=self.group)
        return received

    def all_to_all(self, x: Tensor) -> Tensor:
        """Exchange equal parts along dim 0."""
        sent = self._out("all_to_all", x, 1 - 1 / self.size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.to(x.device)

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        """Exchange rows along dim 0, uneven parts in rank order, while other work goes on."""
        assert len(x) == sum(send) and send[self.rank] == receive[self.rank], f"{send=} {receive=}"
        sent = self._out(name, x, 1 - send[self.rank] / max(1, len(x)))
        received = sent.new_empty((sum(receive), *sent.shape[1:]))
        work = dist.all_to_all_single(
            received, sent, receive, send, group=self.group, async_op=True
        )
        return Pending(received, x.device, work, sent)

    def broadcast(self, x: Tensor) -> Tensor:
        """Send from rank 0 of the group."""
        sent = self._out("broadcast", x, self.size - 1 if self.rank == 0 else 0)
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(x.device)


class OneShotGroup(ProcessGroup):
    """GPUs of one host that read each other's memory: a small sum is one kernel, without NCCL.

    Few rows go on to be added and normalized in it (`sum_norm`, in memory of its own). Every rank
    reads all parts, which costs bytes (size - 1 times as many) and saves latency.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group)
        symmetric = import_module("torch.distributed._symmetric_memory")
        self._name, self._add = group.group_name, torch.ops.symm_mem.one_shot_all_reduce_copy
        num_bytes = _ONE_SHOT_BYTES + shared_bytes(self.size)
        self._shared = symmetric.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)  # a peer may write as soon as it has met this rank
        found = symmetric.rendezvous(self._shared, group)
        offset = self._shared[_ONE_SHOT_BYTES:].data_ptr() - found.buffer_ptrs[self.rank]
        self.peers = Peers.at([at + offset for at in found.buffer_ptrs], self.rank, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; in one kernel where that is faster."""
        if x.nbytes > _ONE_SHOT_BYTES or x.nbytes % 16 or x.dtype not in _ONE_SHOT_DTYPES:
            return super().all_reduce(x)
        self.sent["all_reduce"] += (self.size - 1) * x.nbytes
        shared = self._shared[: x.nbytes].view(x.dtype)
        return self._sum(shared, x.contiguous().flatten()).view(x.shape)

    def _sum(self, shared: Tensor, x: Tensor) -> Tensor:
        return self._add(shared, x, "sum", self._name)


def connect(
    group: dist.ProcessGroup, device: torch.device, via_host: bool, ranks_on_host: int
) -> ProcessGroup:
    """Return the fastest form for a group; all its ranks choose the same. A collective.

    Args:
        group: any; every host holds `ranks_on_host` ranks that follow each other.
        device: this rank's.
        via_host: the backend cannot exchange from there.
        ranks_on_host: ranks of this host.
    """
    ranks = dist.get_process_group_ranks(group)
    is_one_host = len({rank // ranks_on_host for rank in ranks}) == 1
    if device.type != "cuda" or via_host or not is_one_host:
        return ProcessGroup(group, via_host)
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    has_peers = all(torch.cuda.can_device_access_peer(device, i) for i in others)
    if len(ranks) == 1 or not _all_agree(group, device, has_peers):
        return ProcessGroup(group)
    found = None
    try:
        found = OneShotGroup(group, device)
    except (AttributeError, RuntimeError) as error:  # this torch or this machine cannot
        log.info("sums go through NCCL: %s", str(error).split("\n")[0])
    one_shot = _all_agree(group, device, found is not None)
    return found if found and one_shot else ProcessGroup(group)


def _all_agree(group: dist.ProcessGroup, device: torch.device, agrees: bool) -> bool:
    """Tell whether all ranks of a group say so."""
    least = torch.tensor(int(agrees), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return bool(least.item())
