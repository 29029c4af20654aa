"""Exchanges with other ranks: layers get a `Collectives` and never call `torch.distributed`.

`ProcessGroup` exchanges over a torch.distributed group, `OneShotGroup` (`one_shot_group.py`) also
through memory that GPUs share, `MemoryGroup` (`shared_memory.py`) through host memory that ranks of
one host share; `SingleRank` is a group of one rank, without exchanges.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_kernels import NormedSum, Peers, add_rmsnorm, fits_sum_norm, sum_norm

# torch 2.13 renamed these functions and warns about the old names.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class ExchangeMark:
    """Context manager around code that may wait for other ranks in an exchange."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def is_active(self) -> bool:
        """True while a thread is within the context."""
        return self._depth > 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1


class Pending:
    """An exchange in progress. Keeps the sent tensors alive until `wait` returns."""

    def __init__(
        self,
        received: Tensor,
        device: torch.device,
        finish: Callable[[], object] | None = None,
        sent: Tensor | None = None,
        mark: ExchangeMark | None = None,
    ) -> None:
        self._received = received
        self._device = device
        self._finish = finish
        self._sent = sent
        self._mark = mark or ExchangeMark()

    def wait(self) -> Tensor:
        """Return the received tensor. On CUDA only the current stream waits, not the host."""
        with self._mark:
            if self._finish is not None:
                self._finish()
            self._finish = None
            self._sent = None
            return self._received.to(self._device)


class Collectives(ABC):
    """Exchanges among the `size` ranks of one group.

    All ranks must make the same calls in the same order, `Pending.wait` included.

    Attributes:
        rank: this rank's index in the group.
        size: ranks of the group.
        sent: bytes that this rank had to send to others, by operation, as calls are made (replays
            of a CUDA graph are not counted). For an all-reduce, the bytes that a ring sends.
        is_capturable: CUDA graphs can contain the exchanges.
        peers: memory that all ranks read and write; None without.
        num_calls: exchanges begun so far, except by a group of one rank.
    """

    rank: int
    size: int
    sent: Counter[str]
    is_capturable: bool
    peers: Peers | None = None
    num_calls: int = 0

    @property
    def in_exchange(self) -> bool:
        """True while this rank may wait for others in an exchange."""
        return False

    def close(self) -> None:  # noqa: B027 - most forms have nothing to drop
        """Release resources that must not outlive the process group."""

    def sum_norm(
        self, x_TD: Tensor, y_TD: Tensor | None, w_D: Tensor, eps: float, quant: bool, ue8m0: bool
    ) -> NormedSum:
        """Return `add_rmsnorm` of x and the sum of y over ranks; `y_TD` may be overwritten."""
        if self.peers and y_TD is not None and fits_sum_norm(y_TD):
            self.sent["all_reduce"] += (self.size - 1) * y_TD.nbytes
            return sum_norm(x_TD, y_TD, w_D, eps, self.peers, quant=quant, ue8m0=ue8m0)
        y_TD = None if y_TD is None else self.all_reduce(y_TD)
        return add_rmsnorm(x_TD, y_TD, w_D, eps, quant=quant, ue8m0=ue8m0)

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks; `x` may be overwritten."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape], the ranks' tensors in rank order."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return on rank r the sum over ranks of the r-th of `size` equal parts along dim 0."""

    @abstractmethod
    def all_to_all(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r; return the received parts in rank order, same shape."""

    @abstractmethod
    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        """Start an all-to-all of uneven parts along dim 0, while other work continues.

        Args:
            x: [sum(send), ...], the rows for rank 0 first.
            send: number of rows for each rank.
            receive: number of rows from each rank.
            name: the key of `sent` under which the bytes are counted.

        Returns:
            `wait()` returns [sum(receive), ...], in rank order.
        """

    @abstractmethod
    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's tensor; on other ranks `x` may be overwritten."""


class SingleRank(Collectives):
    """A group of one rank: every exchange returns its argument."""

    rank = 0
    size = 1
    is_capturable = True

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        assert send == receive == [len(x)], f"{send=} {receive=} {len(x)=}"
        return Pending(x, x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        return x


class ProcessGroup(Collectives):
    """Exchanges over a torch.distributed group.

    Args:
        group: the ranks.
        via_host: exchange through host memory, for several ranks that share one GPU: they use Gloo,
            which has no all-to-all of CUDA tensors.

    Attributes:
        backend: "nccl" or "gloo".
    """

    def __init__(self, group: dist.ProcessGroup, via_host: bool = False) -> None:
        self.group: dist.ProcessGroup | None = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._via_host = via_host
        self.sent: Counter[str] = Counter()
        self.backend = str(dist.get_backend(group))
        self.is_capturable = self.backend == "nccl"
        self._mark = ExchangeMark()

    @property
    def in_exchange(self) -> bool:
        return self._mark.is_active

    def close(self) -> None:
        """Drop the reference to the group before it is destroyed.

        A reference that outlives `destroy_process_group` makes Gloo abort at interpreter exit
        (its threads are still running when the last one drops).
        """
        self.group = None

    def _prepare(self, operation: str, x: Tensor, parts: float) -> Tensor:
        """Count an exchange, and return its tensor as the backend takes it.

        Args:
            operation: the key of `sent`.
            x: the tensor.
            parts: bytes that this rank sends, as a multiple of `x.nbytes`.
        """
        self.sent[operation] += round(parts * x.nbytes)
        self.num_calls += 1
        return (x.cpu() if self._via_host else x).contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._mark:
            sent = self._prepare("all_reduce", x, 2 - 2 / self.size)
            dist.all_reduce(sent, group=self.group)
            return sent.to(x.device)

    def all_gather(self, x: Tensor) -> Tensor:
        with self._mark:
            sent = self._prepare("all_gather", x, self.size - 1)
            received = sent.new_empty((self.size * sent.shape[0], *sent.shape[1:]))
            _all_gather_single(received, sent, group=self.group)
            return received.view(self.size, *x.shape).to(x.device)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        # Gloo implements it as an all-reduce of all parts; an all-to-all sends fewer bytes.
        if self._via_host or x.device.type == "cpu":
            return self.all_to_all(x).view(self.size, -1, *x.shape[1:]).sum(0)
        with self._mark:
            sent = self._prepare("reduce_scatter", x, 1 - 1 / self.size)
            received = sent.new_empty((len(sent) // self.size, *sent.shape[1:]))
            _reduce_scatter_single(received, sent, group=self.group)
            return received

    def all_to_all(self, x: Tensor) -> Tensor:
        with self._mark:
            sent = self._prepare("all_to_all", x, 1 - 1 / self.size)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self.group)
            return received.to(x.device)

    def start_exchange(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Pending:
        assert len(x) == sum(send) and send[self.rank] == receive[self.rank], f"{send=} {receive=}"
        with self._mark:
            sent = self._prepare(name, x, 1 - send[self.rank] / max(1, len(x)))
            received = sent.new_empty((sum(receive), *sent.shape[1:]))
            work = dist.all_to_all_single(
                received, sent, receive, send, group=self.group, async_op=True
            )
        return Pending(received, x.device, work.wait, sent, self._mark)

    def broadcast(self, x: Tensor) -> Tensor:
        with self._mark:
            sent = self._prepare("broadcast", x, self.size - 1 if self.rank == 0 else 0)
            dist.broadcast(sent, group=self.group, group_src=0)
            return sent.to(x.device)


def library_group() -> ProcessGroup:
    """Return all ranks, as torch.distributed connects them, beside a faster form of the mesh."""
    assert dist.group.WORLD is not None
    return ProcessGroup(dist.group.WORLD)
