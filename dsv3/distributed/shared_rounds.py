"""Rounds of exchanges through a `SharedSegment`.

In a round every rank writes into a buffer of its own, publishes it, waits until the others have
published theirs, and reads them. A rank that publishes a round has read all buffers of the round
before. With two buffers in turns, a rank may therefore overwrite one as soon as all others have
published the round after it: a round takes one synchronization.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dsv3.distributed.shared_segment import BUFFER_BYTES, SharedSegment
from dsv3.errors import RankError

_MOST_VIEWS = 256

_Key = TypeVar("_Key")
_Views = TypeVar("_Views")


class PeerBuffers(NamedTuple):
    """The buffers of a round, divided among the ranks.

    Attributes:
        sent: [size, n] of this rank's buffer, by receiver.
        received: [size, n] for this rank, by sender.
    """

    sent: Tensor
    received: Tensor


class Rounds:
    """One rank's side of the rounds.

    Args:
        segment: mapped by all ranks of the group.
        ranks: the group's ranks in the world, in order.
        rank: of this process in the group.
        is_crowded: the host has fewer cores than ranks; a waiting rank sleeps at once.
    """

    def __init__(
        self, segment: SharedSegment, ranks: Sequence[int], rank: int, is_crowded: bool
    ) -> None:
        self.rank = rank
        self.size = len(ranks)
        self._ranks = ranks
        self._others = [other for other in range(self.size) if other != rank]
        self._segment = segment
        self._is_crowded = is_crowded
        # Of both halves, by dtype and length: making views takes longer than a small exchange.
        self._buffers: dict[tuple[torch.dtype, int], Sequence[Sequence[Tensor]]] = {}
        self._by_peer: dict[tuple[torch.dtype, int], Sequence[PeerBuffers]] = {}
        self._num_published = 0
        self._num_seen = [0] * self.size  # rounds of each rank that this one has waited for

    def begin(self, dtype: torch.dtype, length: int) -> Sequence[Tensor]:
        """Return each rank's [length] of the next round, when this rank may write its own."""
        self._wait_for_last()
        views = self._buffers.get((dtype, length))
        if views is None:
            with torch.inference_mode(False):  # they are written to in any mode
                halves = self._segment.buffers.view(dtype)[..., :length].unbind(1)
                views = [half.unbind() for half in halves]
            _remember(self._buffers, (dtype, length), views)
        return views[self._num_published % 2]

    def begin_by_peer(self, dtype: torch.dtype, length: int) -> PeerBuffers:
        """Return the buffers of the next round as `begin`, divided among the receivers."""
        self._wait_for_last()
        views = self._by_peer.get((dtype, length))
        if views is None:
            peer_len = self.peer_len(dtype)
            with torch.inference_mode(False):
                buffers = self._segment.buffers.view(dtype)[..., : self.size * peer_len]
                halves = buffers.unflatten(2, (self.size, peer_len))[..., :length].unbind(1)
                views = [PeerBuffers(half[self.rank], half[:, self.rank]) for half in halves]
            _remember(self._by_peer, (dtype, length), views)
        return views[self._num_published % 2]

    def peer_len(self, dtype: torch.dtype) -> int:
        """Return the elements of a buffer for each rank."""
        return BUFFER_BYTES // self.size // dtype.itemsize

    def publish(self, call: int, longest: int = 0) -> None:
        """Publish this rank's buffer.

        Args:
            call: a number for the exchange, the same on all ranks.
            longest: the elements of this rank's longest part, in an uneven exchange.
        """
        record = self._segment.records[self.rank][self._num_published % 2]
        record[0] = call
        record[1] = longest
        self._num_published += 1
        self._segment.post()

    def receive(self, other: int) -> int:
        """Wait until another rank has published this round; return its longest part.

        Raises:
            RankError: it is in another exchange.
        """
        self._wait_for(other)
        half = (self._num_published - 1) % 2
        mine = self._segment.records[self.rank][half]
        theirs = self._segment.records[other][half]
        if mine[0] != theirs[0]:
            raise RankError(
                f"rank {self._ranks[self.rank]} is in another exchange than rank "
                f"{self._ranks[other]}: all ranks must make the same calls"
            )
        return theirs[1]

    def receive_all(self) -> int:
        """Wait until all ranks have published this round; return the others' longest part."""
        longest = 0
        for other in self._others:
            longest = max(longest, self.receive(other))
        return longest

    def _wait_for_last(self) -> None:
        """Wait until all ranks have published the last round, and so read the one before."""
        for other in self._others:
            if self._num_seen[other] < self._num_published:
                self._wait_for(other)

    def _wait_for(self, other: int) -> None:
        while self._num_seen[other] < self._num_published:
            self._segment.wait(other, self._is_crowded)
            self._num_seen[other] += 1


def _remember(known: dict[_Key, _Views], key: _Key, views: _Views) -> None:
    """Add views that may be needed again; of all lengths, some at most."""
    if len(known) == _MOST_VIEWS:
        known.clear()
    known[key] = views
