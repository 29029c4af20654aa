"""A group of ranks in which only one exists: shapes as in the group, no exchange."""

from collections import Counter

import torch
from torch import Tensor

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import Collectives, Pending, SingleRank
from dsv3.distributed.mesh import Mesh


class StandIn(Collectives):
    """Rank r of w alone on one device: shapes as in the group, values its own.

    With `moves`, every exchange writes as many bytes to memory as it would have received;
    otherwise it costs as little as it can.
    """

    def __init__(self, rank: int, size: int, moves: bool = True) -> None:
        self.rank, self.size, self._moves = rank, size, moves
        self.is_capturable = True
        self.sent: Counter[str] = Counter()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`; a ring brings almost twice its bytes."""
        return x.expand(2, *x.shape).contiguous()[0] if self._moves else x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` as every rank's part."""
        every = x.expand(self.size, *x.shape)
        return every.contiguous() if self._moves else every

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's part of `x`."""
        return self.all_to_all(x).chunk(self.size)[self.rank]

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x.clone() if self._moves else x

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        """Return as many rows as would have come, those of `x` over and over."""
        rows = torch.arange(sum(receive), device=x.device) % max(1, len(x))
        received = x[rows] if len(x) else x.new_zeros(len(rows), *x.shape[1:])
        return Pending(received, x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return `x`: plans come from rank 0, which this one is."""
        return x


def stand_in_mesh(layout: ParallelConfig, device: torch.device, moves: bool = True) -> Mesh:
    """Return the mesh of one rank whose peers do not exist."""
    world = StandIn(layout.rank, layout.world_size, moves)
    tp = world if layout.dp == 1 else StandIn(layout.tp_rank, layout.tp, moves)
    return Mesh(layout, device, world, tp, SingleRank(), 1)
