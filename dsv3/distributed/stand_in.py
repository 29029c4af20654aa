"""Collectives of one rank without its peers: shapes as in the full group, no communication."""

from collections import Counter

import torch
from torch import Tensor

from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import Collectives, Pending, SingleRank
from dsv3.distributed.mesh import Mesh


class StandIn(Collectives):
    """One rank of `size` on one device: results have the group's shapes and this rank's values.

    With `moves`, each exchange writes as many bytes to memory as it would have received; without,
    it costs next to nothing.
    """

    def __init__(self, rank: int, size: int, moves: bool = True) -> None:
        self.rank = rank
        self.size = size
        self._moves = moves and size > 1  # a single rank exchanges nothing
        self.is_capturable = True
        self.sent: Counter[str] = Counter()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`; with `moves`, write twice its bytes, as a ring all-reduce almost does."""
        return x.expand(2, *x.shape).contiguous()[0] if self._moves else x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` as every rank's part."""
        gathered = x.expand(self.size, *x.shape)
        return gathered.contiguous() if self._moves else gathered

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's part of `x`."""
        return self.all_to_all(x).chunk(self.size)[self.rank]

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x.clone() if self._moves else x

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        """Return `sum(receive)` rows, the rows of `x` repeated."""
        rows = torch.arange(sum(receive), device=x.device) % max(1, len(x))
        received = x[rows] if len(x) else x.new_zeros(len(rows), *x.shape[1:])
        return Pending(received, x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return `x`: this rank acts as rank 0, the source of plans."""
        return x


def stand_in_mesh(layout: ParallelConfig, device: torch.device, moves: bool = True) -> Mesh:
    """Return a mesh of one rank without its peers."""
    world = StandIn(layout.rank, layout.world_size, moves)
    tp = world if layout.dp == 1 else StandIn(layout.tp_rank, layout.tp, moves)
    return Mesh(layout, device, world, tp, SingleRank(), 1)
