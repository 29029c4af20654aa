"""Exchanges of CPU tensors among ranks of one host, through memory that all of them map.

Sums are added in rank order, so that all ranks get the same bits.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dsv3.distributed.collectives import Collectives, ExchangeMark, Pending
from dsv3.distributed.shared_rounds import PeerBuffers, Rounds
from dsv3.distributed.shared_segment import BUFFER_BYTES

_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "uneven", "broadcast")
# Among several ranks, from this size on each sums its own part only, and the others copy the sum.
_SPLIT_BYTES = 16 << 10
_NO_CONTEXT = nullcontext()


class MemoryGroup(Collectives):
    """Exchanges through memory; all ranks are processes of this host."""

    is_capturable = False

    def __init__(self, rounds: Rounds) -> None:
        self.rank = rounds.rank
        self.size = rounds.size
        self.sent: Counter[str] = Counter()
        self._rounds = rounds
        self._started: _StartedExchange | None = None
        self._mark = ExchangeMark()

    @property
    def in_exchange(self) -> bool:
        return self._mark.is_active

    def _begin(self, operation: str, x: Tensor, parts: float) -> None:
        """Count an exchange that sends `parts` times the bytes of `x`, and finish the last one."""
        self.sent[operation] += round(parts * x.nbytes)
        self.num_calls += 1
        if self._started is not None:
            self._started.finish()
            self._started = None

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with self._mark, _inference_mode():
            self._begin("all_reduce", x, 2 - 2 / self.size)
            is_split = self.size > 2 and x.nbytes >= _SPLIT_BYTES
            for _, part in _parts(x.view(-1), BUFFER_BYTES // x.itemsize):
                self._sum_parts(part, x.nbytes) if is_split else self._sum(part, x.nbytes)
        return x

    def _sum(self, x: Tensor, num_bytes: int) -> None:
        """Replace [n] by its sum over ranks; every rank adds all of it."""
        buffers = self._rounds.begin(x.dtype, x.shape[0])
        buffers[self.rank].copy_(x)
        self._rounds.publish(_call("all_reduce", num_bytes))
        self._rounds.receive_all()
        _add(buffers, x)

    def _sum_parts(self, x: Tensor, num_bytes: int) -> None:
        """Replace [n] by its sum over ranks; every rank adds one part of it."""
        call = _call("all_reduce", num_bytes)
        buffers = self._rounds.begin(x.dtype, len(x))
        buffers[self.rank].copy_(x)
        self._rounds.publish(call)
        self._rounds.receive_all()
        width = math.ceil(len(x) / self.size)
        addends = [buffer[self.rank * width : (self.rank + 1) * width] for buffer in buffers]
        sums = self._rounds.begin(x.dtype, width)
        _add(addends, sums[self.rank][: len(addends[0])])
        self._rounds.publish(call)
        self._rounds.receive_all()
        for total, part in zip(sums, x.split(width), strict=False):
            part.copy_(total[: len(part)])

    def all_gather(self, x: Tensor) -> Tensor:
        with self._mark:
            self._begin("all_gather", x, self.size - 1)
            gathered = [
                self._gather(part, x.nbytes)
                for _, part in _parts(x.reshape(-1), BUFFER_BYTES // x.itemsize)
            ]
            return _joined(gathered).view(self.size, *x.shape)

    def _gather(self, x: Tensor, num_bytes: int) -> Tensor:
        """Return [size, n] of the ranks' [n]."""
        buffers = self._rounds.begin(x.dtype, x.shape[0])
        buffers[self.rank].copy_(x)
        self._rounds.publish(_call("all_gather", num_bytes))
        self._rounds.receive_all()
        return torch.stack(list(buffers))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        total = x.new_empty((len(x) // self.size, *x.shape[1:]))
        with self._mark, _inference_mode():
            self._begin("reduce_scatter", x, 1 - 1 / self.size)
            for start, parts in self._swap("reduce_scatter", x):
                _add(parts.unbind(), _columns(total.view(-1), start, parts.shape[1]))
        return total

    def all_to_all(self, x: Tensor) -> Tensor:
        with self._mark:
            self._begin("all_to_all", x, 1 - 1 / self.size)
            received = [parts.clone() for _, parts in self._swap("all_to_all", x)]
            return _joined(received).view(x.shape)

    def _swap(self, operation: str, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Exchange `size` equal parts of `x`.

        Yields:
            index of an element of a part, and [size, n] elements from there, one row of each rank;
            valid until the next.
        """
        for start, part in _parts(x.reshape(self.size, -1), self._rounds.peer_len(x.dtype)):
            buffers = self._rounds.begin_by_peer(x.dtype, part.shape[1])
            buffers.sent.copy_(part)
            self._rounds.publish(_call(operation, x.nbytes))
            self._rounds.receive_all()
            yield start, buffers.received

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        assert len(x) == sum(send) and send[self.rank] == receive[self.rank], f"{send=} {receive=}"
        received = x.new_empty((sum(receive), *x.shape[1:]))
        with self._mark, _inference_mode():
            self._begin(name, x, 1 - send[self.rank] / max(1, len(x)))
            started = _StartedExchange(self._rounds, x, send, received, receive)
            self._started = started
        return Pending(received, x.device, started.finish, x, self._mark)

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with self._mark, _inference_mode():
            self._begin("broadcast", x, self.size - 1 if self.rank == 0 else 0)
            for _, part in _parts(x.view(-1), BUFFER_BYTES // x.itemsize):
                buffer = self._rounds.begin(x.dtype, len(part))[0]
                if self.rank == 0:
                    buffer.copy_(part)
                self._rounds.publish(_call("broadcast", x.nbytes))
                if self.rank:
                    self._rounds.receive(0)
                    part.copy_(buffer)
        return x


class _StartedExchange:
    """An all-to-all of uneven parts, of which the first round has been published.

    Its rounds end before the group's next exchange begins, even if `Pending.wait` is called later.
    """

    def __init__(
        self, rounds: Rounds, x: Tensor, send: list[int], received: Tensor, receive: list[int]
    ) -> None:
        row_len = math.prod(x.shape[1:])
        self._rounds = rounds
        self._sent = x.reshape(-1).split([count * row_len for count in send])
        self._received = received.view(-1).split([count * row_len for count in receive])
        self._received[rounds.rank].copy_(self._sent[rounds.rank])
        self._others = [rank for rank in range(rounds.size) if rank != rounds.rank]
        self._call = _call("uneven", row_len * x.itemsize)
        self._longest = max(len(part) for part in self._sent)
        self._is_finished = False
        self._peer_len = rounds.peer_len(received.dtype)
        self._buffers = self._publish(0)

    def _publish(self, start: int) -> PeerBuffers:
        """Publish elements of all parts from `start` on; return the round's buffers."""
        dtype = self._received[0].dtype
        buffers = self._rounds.begin_by_peer(dtype, self._peer_len)
        for other in self._others:
            part = self._sent[other][start : start + self._peer_len]
            buffers.sent[other, : len(part)].copy_(part)
        self._rounds.publish(self._call, self._longest)
        return buffers

    @torch.inference_mode()
    def finish(self) -> None:
        """Receive all parts. A second call does nothing."""
        if self._is_finished:
            return
        self._is_finished = True
        longest = max(self._longest, self._rounds.receive_all())
        self._take(0)
        for start in range(self._peer_len, longest, self._peer_len):
            self._buffers = self._publish(start)
            self._rounds.receive_all()
            self._take(start)

    def _take(self, start: int) -> None:
        """Copy the elements of a round from its buffers."""
        for other in self._others:
            part = self._received[other][start : start + self._peer_len]
            part.copy_(self._buffers.received[other, : len(part)])


def _call(operation: str, num_bytes: int) -> int:
    """Return a number for an exchange, by which a rank in another one is detected."""
    return num_bytes * len(_OPERATIONS) + _OPERATIONS.index(operation)


def _parts(x: Tensor, length: int) -> Sequence[tuple[int, Tensor]]:
    """Return parts of `x` along its last dim, with the index of the first element; at least one."""
    count = x.shape[-1]
    if count <= length:
        return ((0, x),)
    return [(at, _columns(x, at, min(length, count - at))) for at in range(0, count, length)]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Return the tensors, joined along dim 1."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows), 1)


def _columns(x: Tensor, start: int, count: int) -> Tensor:
    """Return elements of `x` along its last dim."""
    return x if count == x.shape[-1] else x[..., start : start + count]


def _inference_mode() -> AbstractContextManager[None]:
    """Return a context to write into a caller's tensor, in inference mode or not.

    A step is in this mode, and entering it again takes as long as a small exchange.
    """
    return _NO_CONTEXT if torch.is_inference_mode_enabled() else torch.inference_mode()


def _add(parts: Sequence[Tensor], total: Tensor) -> None:
    """Write the sum of the ranks' [n], in their order, to [n]."""
    torch.add(parts[0], parts[1], out=total)
    for other in parts[2:]:
        total.add_(other)
