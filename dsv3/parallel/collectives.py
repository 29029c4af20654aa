"""The only door to other ranks: layers are handed a `Collectives` and never call `dist` themselves.

Two forms: over a process group, and a world of one in which nothing moves.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it and warns about the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Collectives(Protocol):
    """Exchanges among the `size` ranks of one group. All ranks must call in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks; `x` may be overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape], the ranks' tensors in rank order."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r; return the received parts in rank order, same shape."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's tensor; `x` is overwritten elsewhere."""
        ...


class SingleRank:
    """A group of one: every exchange is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` as the only part."""
        return x.unsqueeze(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class ProcessGroup:
    """Exchanges over a torch.distributed group.

    Gloo has no all-to-all of CUDA tensors: with `via_host` everything travels through host memory
    (several ranks sharing one GPU).
    """

    def __init__(self, group: dist.ProcessGroup, via_host: bool = False) -> None:
        self.group: dist.ProcessGroup | None = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._via_host = via_host

    def close(self) -> None:
        """Let go of the group before it is destroyed.

        A reference that outlives `destroy_process_group` makes Gloo abort at interpreter exit
        (its threads are still running when the last one drops).
        """
        self.group = None

    def _out(self, x: Tensor) -> Tensor:
        return (x.cpu() if self._via_host else x).contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place where possible."""
        sent = self._out(x)
        dist.all_reduce(sent, group=self.group)
        return sent.to(x.device)

    def all_gather(self, x: Tensor) -> Tensor:
        """Stack the ranks' tensors."""
        sent = self._out(x)
        received = sent.new_empty((self.size * sent.shape[0], *sent.shape[1:]))
        _all_gather_single(received, sent, group=self.group)
        return received.view(self.size, *x.shape).to(x.device)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Exchange equal parts along dim 0."""
        sent = self._out(x)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.to(x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        """Send from rank 0 of the group."""
        sent = self._out(x)
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(x.device)
