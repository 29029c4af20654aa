"""Dispatch and combine: tokens travel to the ranks that hold their experts, and results back.

Experts lie in equal contiguous ranges over the world; the tokens of a dp group are on all of its tp
ranks, and the caller sums over tp. Two forms of the same sum:

* `allreduce`: every rank sees every token (those of other dp groups are gathered), runs its experts
  on those that chose them, and the partial sums are added up where the tokens came from.
* `alltoall`: a token is sent once to every rank outside its own tp group that holds any of its
  experts, by one tp rank, which splits the work with its peers; one partial sum comes back.

Between hosts a token is sent once to every host that it needs (to the rank at the same place
there), which spreads it inside: two levels of the same exchange.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.config import split_range
from dsv3.parallel.collectives import Collectives
from dsv3.parallel.mesh import Mesh

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Finish = Callable[[], Tensor]
Rows = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How tokens are brought to their experts.

    Attributes:
        form: "allreduce", "alltoall", or "auto", by the number of tokens.
        fp8: hidden states travel in e4m3 with a scale per 128, not in the activations' dtype.
        capacity_factor: rows for a destination in steps of static shape, as a multiple of what
            an even distribution needs.
    """

    form: str = "auto"
    fp8: bool = False
    capacity_factor: float = 2.0


class ExpertPlacement:
    """Where copies of experts are: slot_EC holds physical slots, copies_E how many are valid."""

    def __init__(self, slot_EC: Tensor, copies_E: Tensor, dp_rank: int = 0) -> None:
        self._slot_EC, self._copies_E, self._dp_rank = slot_EC, copies_E, dp_rank

    def __call__(self, ids_TK: Tensor) -> Tensor:
        """Return the slots that serve the tokens: copies take turns, in an order that is fixed."""
        turn_T1 = torch.arange(len(ids_TK), device=ids_TK.device)[:, None] + self._dp_rank
        return self._slot_EC[ids_TK, turn_T1 % self._copies_E[ids_TK]]


class RowFormat:
    """How tokens travel: hidden state, expert ids and weights as the bytes of one row each."""

    def __init__(self, fp8: bool) -> None:
        self._fp8 = fp8

    def pack(self, x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """Return the bytes, [M, ...] uint8."""
        parts = (x_MD, ids_MK.int(), weight_MK.float())
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def unpack(self, rows: Tensor, like: Rows) -> Rows:
        """Return what was packed, in the dtypes and widths of `like`."""
        x_RD, ids_RK, weight_RK = like
        dim, top_k = x_RD.shape[1], ids_RK.shape[1]
        x, ids, weight = rows.split([dim * x_RD.itemsize, 4 * top_k, 4 * top_k], dim=1)
        return (
            x.contiguous().view(x_RD.dtype),
            ids.contiguous().view(torch.int32).to(ids_RK.dtype),
            weight.contiguous().view(torch.float32).to(weight_RK.dtype),
        )


@dataclass(frozen=True, slots=True)
class _Own:
    """The first `count` rows are the tp group's own; this rank dispatches start to stop of them."""

    count: int
    start: int
    stop: int

    def chosen(self, x_R: Tensor) -> Tensor:
        """Return the rows that this rank may have to send: its share, and what is not own."""
        return torch.cat([x_R[self.start : self.stop], x_R[self.count :]])


@dataclass(frozen=True, slots=True)
class _Room:
    """Rows for every member, whether more may be needed, and how many come in at a member."""

    capacity: int
    may_overflow: bool
    received: int


class _Level:
    """An exchange among the members of one group.

    Args:
        group: its members hold `per_member` experts each, from `first` on.
        same: the members that hold the same own rows as this rank, this one among them.
        only_own: no row but own ones is ever dispatched.
        rows: how they travel.
        device: of the rows.
    """

    def __init__(
        self,
        group: Collectives,
        first: int,
        per_member: int,
        same: range,
        only_own: bool,
        rows: RowFormat,
        device: torch.device,
    ) -> None:
        self._group, self._first, self._per_member = group, first, per_member
        self._same, self._rows = same, rows
        silent = same if only_own else range(group.rank, group.rank + 1)
        self._is_heard = [w not in silent for w in range(group.size)]
        self._is_heard_W = torch.tensor([*self._is_heard, False], device=device)

    def room(self, num_rows: int, top_k: int, factor: float) -> _Room:
        """Return a fixed capacity for up to `num_rows` that a member may have to send."""
        share = factor * min(top_k, self._group.size) / self._group.size
        capacity = min(num_rows, math.ceil(share * num_rows))
        return _Room(capacity, capacity < num_rows, sum(self._is_heard) * capacity)

    def start(
        self,
        rows_R: Rows,
        own: _Own,
        run: Run,
        room: _Room | None = None,
        overflow: Tensor | None = None,
    ) -> Finish:
        """Send rows to the members that hold their experts.

        Args:
            rows_R: hidden states, ids (those of nobody here are skipped) and weights.
            own: which of them other members hold, too.
            run: called with all rows for this member; returns their partial sums, in float32.
            room: a fixed capacity, the same for all members; None exchanges exact counts.
            overflow: set where the room is too small (what comes out is then wrong). Without it
                the members agree to exchange exact counts instead.

        Returns:
            A function that completes the exchange and returns this rank's part of the sums.
        """
        x_RD, ids_RK, _ = rows_R
        member_SK = self._members(own, ids_RK)
        is_sent_SW = torch.zeros(
            len(member_SK), self._group.size + 1, dtype=torch.int64, device=x_RD.device
        ).scatter_(1, member_SK, 1)
        count_W = is_sent_SW.sum(0)
        if room is not None and room.may_overflow:
            is_over = (count_W[:-1] > room.capacity).any()
            if overflow is not None:
                overflow |= is_over
            elif self._group.all_reduce(is_over.int()).item():
                room = None
        if room is None:
            count_W = count_W.masked_fill(~self._is_heard_W, 0)
            both = torch.stack([count_W[:-1], self._group.all_to_all(count_W[:-1])])
            send, receive = both.tolist()
        else:
            count_W = self._is_heard_W * room.capacity
            send = receive = [heard * room.capacity for heard in self._is_heard]
        row_SK = _row_numbers(member_SK, is_sent_SW, count_W, sum(send))
        x, ids, weight = (own.chosen(part) for part in rows_R)
        packed = self._pack((x, ids, weight), row_SK, sum(send), is_padded=room is not None)
        pending = self._group.start_all_to_all(packed, send, receive)

        def finish() -> Tensor:
            arrived = self._rows.unpack(pending.wait(), rows_R)
            joined = (torch.cat(pair) for pair in zip(rows_R, arrived, strict=True))
            y_RD, y_MD = run(*joined).split([len(x_RD), sum(receive)])
            back = self._group.start_all_to_all(y_MD.to(x_RD.dtype), receive, send).wait()
            y_SD = _add_up(back, row_SK)
            num_own = own.stop - own.start
            y_RD[own.start : own.stop] += y_SD[:num_own]
            y_RD[own.count :] += y_SD[num_own:]
            return y_RD

        return finish

    def _members(self, own: _Own, ids_RK: Tensor) -> Tensor:
        """Return the members that the rows go to, each once and ascending; size for no more."""
        nobody = self._group.size
        member_RK = (ids_RK - self._first).div(self._per_member, rounding_mode="floor")
        is_silent_RK = (member_RK < 0) | (member_RK >= nobody) | (member_RK == self._group.rank)
        is_same = (member_RK >= self._same.start) & (member_RK < self._same.stop)
        is_silent_RK[: own.count] |= is_same[: own.count]
        member_SK = own.chosen(member_RK.masked_fill(is_silent_RK, nobody)).sort(dim=1).values
        is_repeated = member_SK[:, 1:] == member_SK[:, :-1]
        member_SK[:, 1:].masked_fill_(is_repeated, nobody)
        return member_SK

    def _pack(self, rows_S: Rows, row_SK: Tensor, total: int, is_padded: bool) -> Tensor:
        """Return the send buffer."""
        num_rows, top_k = row_SK.shape
        if is_padded:  # empty rows carry the ids of a row past the end
            x, ids, weight = (F.pad(part, (0, 0, 0, 1)) for part in rows_S)
            ids[num_rows] = -1
            rows_S = x, ids, weight
        source_S = torch.arange(num_rows, device=row_SK.device).repeat_interleave(top_k)
        source_M = torch.full((total + 1,), num_rows, device=row_SK.device)
        source_M = source_M.scatter_(0, row_SK.flatten(), source_S)[:total]
        return self._rows.pack(*(part[source_M] for part in rows_S))


def _row_numbers(member_SK: Tensor, is_sent_SW: Tensor, count_W: Tensor, total: int) -> Tensor:
    """Return where each row goes in a send buffer of so many rows; `total` for nowhere."""
    place_SK = (is_sent_SW.cumsum(0) - 1).gather(1, member_SK)
    start_W = count_W.cumsum(0) - count_W
    is_out = place_SK >= count_W[member_SK]
    return (start_W[member_SK] + place_SK).masked_fill(is_out, total)


def _add_up(back_MD: Tensor, row_SK: Tensor) -> Tensor:
    """Return the sums of the rows that came back, in float32 and in the order of their ranks."""
    back_MD = F.pad(back_MD, (0, 0, 0, 1))
    y_SD = torch.zeros(len(row_SK), back_MD.shape[1], device=back_MD.device)
    for k in range(row_SK.shape[1]):
        y_SD += back_MD[row_SK[:, k]]
    return y_SD


class ExpertDispatch:
    """Brings the tokens of a step to their experts, in all MoE layers of a model.

    Args:
        mesh: the ranks.
        num_slots: experts, or physical slots for them and their copies, over the whole world.
        settings: which form, and how tokens travel.
    """

    def __init__(
        self, mesh: Mesh, num_slots: int, settings: DispatchSettings | None = None
    ) -> None:
        self.settings = settings or DispatchSettings()
        self._mesh, self._layout = mesh, mesh.layout
        self._rows = RowFormat(self.settings.fp8)
        self._tokens: list[int] | None = None
        self._is_fixed = self._is_deferred = False
        self._overflow = torch.zeros((), dtype=torch.bool, device=mesh.device)
        tp, rank = mesh.layout.tp, mesh.layout.rank
        own = range(rank // tp * tp, rank // tp * tp + tp)
        hosts, host = mesh.hosts, mesh.host
        each = num_slots // mesh.layout.ep
        # Outermost first: hosts, then ranks. One level where a tp group spans hosts.
        self._levels = [_Level(mesh.world, 0, each, own, True, self._rows, mesh.device)]
        if hosts.size > 1 and host.size % tp == 0:
            here, first_rank = range(hosts.rank, hosts.rank + 1), hosts.rank * host.size
            own = range(own.start - first_rank, own.stop - first_rank)
            self._levels = [
                _Level(hosts, 0, each * host.size, here, True, self._rows, mesh.device),
                _Level(host, first_rank * each, each, own, False, self._rows, mesh.device),
            ]

    def begin_step(
        self, tokens: Sequence[int] | None, fixed: bool = False, deferred: bool = False
    ) -> None:
        """Say how many tokens every dp group has in the coming step.

        Args:
            tokens: by dp group; None has them exchanged in every layer.
            fixed: shapes depend on `tokens` only, not on the routing. Where the room is too small
                the ranks agree, layer by layer, to exchange exact sizes.
            deferred: do not even look whether it is (CUDA graphs): ask `overflowed` after the
                step, and if so run it again without.
        """
        assert tokens is not None or not fixed
        self._tokens = None if tokens is None else list(tokens)
        self._is_fixed, self._is_deferred = fixed, deferred

    def overflowed(self) -> bool:
        """Tell whether any rank met more tokens than fit since the last call. A collective."""
        count = self._mesh.world.all_reduce(self._overflow.int())
        self._overflow.zero_()
        return bool(count.item())

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, run: Run) -> Finish:
        """Send tokens to their experts; other work may be done before the result is asked for.

        Args:
            x_TD: [T, D] hidden states, the same on all tp ranks of a dp group.
            ids_TK: [T, K] int64 slots of experts; -1 for none.
            weight_TK: [T, K] float32.
            run: (x_MD, ids_MK, weight_MK) -> [M, D] float32, the sums over this rank's experts;
                it skips other ids.

        Returns:
            A function that returns [T, D] float32; its sum over tp is the layer's output.
        """
        rows = x_TD, ids_TK, weight_TK
        if self._layout.dp == 1:
            return lambda: run(*rows)
        tokens = self._tokens or self._exchange_counts(len(x_TD))
        assert tokens[self._layout.dp_rank] == len(x_TD), f"{tokens=} but {len(x_TD)} here"
        if self.form(tokens) == "allreduce":
            return self._gather(rows, run, tokens)
        return self._send(rows, run, tokens)

    def form(self, tokens: Sequence[int]) -> str:
        """Return the form of a step of so many tokens in every dp group."""
        if self.settings.form != "auto":
            return self.settings.form
        return "alltoall"

    def _exchange_counts(self, count: int) -> list[int]:
        mine = torch.tensor([count], device=self._mesh.device)
        counts: list[int] = self._mesh.dp.all_gather(mine).flatten().tolist()
        return counts

    def _gather(self, rows: Rows, run: Run, tokens: Sequence[int]) -> Finish:
        """Run on the tokens of all dp groups; each gets its partial sums back."""
        count, dp = len(rows[0]), self._mesh.dp
        packed = F.pad(self._rows.pack(*rows), (0, 0, 0, max(tokens) - count))
        gathered = torch.cat([g[:n] for g, n in zip(dp.all_gather(packed), tokens, strict=True)])

        def finish() -> Tensor:
            y_MD = run(*self._rows.unpack(gathered, rows)).to(rows[0].dtype)
            back = dp.start_all_to_all(y_MD, list(tokens), [count] * dp.size).wait()
            y_TD = torch.zeros(rows[0].shape, dtype=torch.float32, device=y_MD.device)
            for part in back.split([count] * dp.size):
                y_TD += part
            return y_TD

        return finish

    def _send(self, rows: Rows, run: Run, tokens: Sequence[int]) -> Finish:
        """Run on the tokens that chose this rank's experts, wherever they are."""
        layout, top_k = self._layout, rows[1].shape[1]
        own = _Own(len(rows[0]), *split_range(len(rows[0]), layout.tp, layout.tp_rank))
        rooms: list[_Room | None] = [None, None]
        if self._is_fixed:
            num_rows = -(-max(tokens) // layout.tp)
            for i, level in enumerate(self._levels):
                room = level.room(num_rows, top_k, self.settings.capacity_factor)
                rooms[i], num_rows = room, num_rows + room.received
        overflow = self._overflow if self._is_deferred else None

        def spread(x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
            inside = self._levels[1]
            return inside.start((x_MD, ids_MK, weight_MK), own, run, rooms[1], overflow)()

        next_run = spread if len(self._levels) > 1 else run
        return self._levels[0].start(rows, own, next_run, rooms[0], overflow)
