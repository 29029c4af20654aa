"""Dispatch and combine: tokens travel to the ranks that hold their experts, and results back.

Experts lie in equal contiguous ranges over the world; the tokens of a dp group are on all of its tp
ranks, and the caller sums over tp. Two forms of the same sum:

* `allreduce`: every rank sees every token (those of other dp groups are gathered), runs its experts
  on those that chose them, and the partial sums are added up where the tokens came from.
* `alltoall`: a token is sent once to every rank outside its own tp group that holds any of its
  experts, by one tp rank, which splits the work with its peers; one partial sum comes back.

Between hosts a token is sent once to every host that it needs (to the rank at the same place
there), which spreads it inside: two levels of the same exchange.

In steps of static shape there is room for every row at every destination. On one level that moves
as many bytes as gathering, which `auto` then takes; between hosts it moves fewer.

Letters: W members of a group, R rows at hand on this one, S those of them that it may send.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.config import split_range
from dsv3.distributed.collectives import Collectives
from dsv3.distributed.mesh import Mesh
from dsv3.parallel.expert_slots import ExpertSlots
from dsv3_kernels import act_quant, weight_dequant

FP8, BLOCK = torch.float8_e4m3fn, 128
Rows = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Finish = Callable[[], Tensor]
# By device: an all-to-all of exact sizes has to save so many bytes a rank to be worth its exchange
# of counts. Gloo: measured, eight ranks of V3's width on two cores change between 16 and 32 tokens
# a dp group (1.4 and 2.8 MB). NCCL: not measured, 60 us at 300 GB/s.
_WORTH_BYTES = {"cpu": 2 << 20, "cuda": 18 << 20}


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How tokens are brought to their experts.

    Attributes:
        form: "allreduce", "alltoall", or "auto", by the number of tokens.
        dtype: hidden states travel in this one, e4m3 with a scale per 128; None: as they are.
            Sums come back in the dtype of the activations.
        groups: groups of neighbouring experts, and how many of them a token chooses from.
        ue8m0: scales are powers of two, as the experts' products have them: quantizing again what
            came in FP8 then gives the same values.
    """

    form: str = "auto"
    dtype: torch.dtype | None = None
    groups: tuple[int, int] = (1, 1)
    ue8m0: bool = False


def pack(rows: Rows, settings: DispatchSettings) -> Tensor:
    """Return hidden state, ids and weights as the bytes of one row each, [M, ...] uint8."""
    x_MD, ids_MK, weight_MK = rows
    x_parts: tuple[Tensor, ...]
    if settings.dtype == FP8:
        x_parts = act_quant(x_MD.contiguous(), settings.ue8m0)
    else:
        x_parts = (x_MD.to(settings.dtype or x_MD.dtype),)
    parts = (*x_parts, ids_MK.int(), weight_MK)
    if not len(x_MD):  # a reduction over no rows leaves strides that `view` refuses
        parts = tuple(part.new_empty(part.shape) for part in parts)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack(packed: Tensor, like: Rows, settings: DispatchSettings) -> Rows:
    """Return what was packed, in the dtypes and widths of `like`."""
    x_RD, ids_RK, weight_RK = like
    dim, top_k, dtype = x_RD.shape[1], ids_RK.shape[1], settings.dtype or x_RD.dtype
    scales = 4 * (dim // BLOCK) if dtype == FP8 else 0
    widths = [dim * dtype.itemsize, scales, 4 * top_k, 4 * top_k]
    x, scale, ids, weight = packed.split(widths, dim=1)
    x = x.view(dtype)
    if dtype == FP8:
        x = weight_dequant(x, scale.view(torch.float32), x_RD.dtype, block=(1, BLOCK))
    return x.to(x_RD.dtype), ids.view(torch.int32).to(ids_RK.dtype), weight.view(weight_RK.dtype)


@dataclass(frozen=True)
class _Level:
    """An exchange among the members of one group.

    Attributes:
        group: its members hold `per_member` experts each, from `first` on.
        same: the members that need not be sent own rows, this one among them.
        share: in so many parts ranks divide own rows, and the one that is this rank's.
        settings: how rows travel.
        is_inner: it passes on what came from other hosts, beside sending own rows.
    """

    group: Collectives
    first: int
    per_member: int
    same: range
    share: tuple[int, int]
    settings: DispatchSettings
    is_inner: bool = False

    @property
    def silent(self) -> range:
        """The members that no row is sent to."""
        return range(self.group.rank, self.group.rank + 1) if self.is_inner else self.same

    def reach(self, top_k: int) -> int:
        """Return how many members a token can need: a group of experts lies on few of them."""
        size, (groups, chosen) = self.group.size, self.settings.groups
        return min(top_k, size, size if self.is_inner else chosen * -(-size // groups))

    def start(self, rows_R: Rows, num_own: int, run: Run, max_rows: int) -> Finish:
        """Send rows to the members that hold their experts.

        Args:
            rows_R: hidden states, ids (those of nobody here are skipped) and weights.
            num_own: so many of them, the first ones, are those of the dp group.
            run: called with all rows for this member; returns their partial sums, in float32.
            max_rows: the most that any member sends, for static shapes; 0 for exact ones.

        Returns:
            A function that completes the exchange and returns this rank's part of the sums.
        """
        index_R = torch.arange(len(rows_R[0]), device=rows_R[0].device)
        start, stop = split_range(num_own, *self.share)
        mine_S = torch.cat([index_R[start:stop], index_R[num_own:]])
        member_SK = self._members(rows_R[1], num_own)[mine_S]
        row_SK, send, receive = self._arrange(member_SK, max_rows)
        source_M = torch.full((sum(send) + 1,), len(index_R), device=index_R.device)
        source_M.scatter_(0, row_SK.flatten(), mine_S.repeat_interleave(row_SK.shape[1]))
        # Room that nothing takes is filled with a row past the end, which has no experts.
        pad = (0, 0, 0, 1)
        padded_R = [F.pad(part, pad, value=-1) if max_rows else part for part in rows_R]
        x, ids, weight = (part[source_M[:-1]] for part in padded_R)
        packed = pack((x, ids, weight), self.settings)
        pending = self.group.start_exchange(packed, send, receive, "dispatch")

        def finish() -> Tensor:
            arrived = unpack(pending.wait(), rows_R, self.settings)
            x, ids, weight = (torch.cat(pair) for pair in zip(rows_R, arrived, strict=True))
            y_RD, y_MD = run(x, ids, weight).split([len(index_R), sum(receive)])
            y_MD = y_MD.to(x.dtype)
            back_MD = self.group.start_exchange(y_MD, receive, send, "combine").wait()
            # In the order of the members; what went nowhere looks at a row past the end.
            table_MD = F.pad(back_MD.float(), (0, 0, 0, 1))
            y_RD[mine_S] += F.embedding_bag(row_SK, table_MD, mode="sum", padding_idx=len(back_MD))
            return y_RD

        return finish

    def _arrange(self, member_SK: Tensor, max_rows: int) -> tuple[Tensor, list[int], list[int]]:
        """Return where each row goes in the send buffer, and the rows for and from each member.

        A row that goes nowhere has the number of all rows. In static shapes there is room for all
        rows at every member, so that nothing is ever left behind.
        """
        size = self.group.size
        is_sent_SW = member_SK.new_zeros(len(member_SK), size + 1).scatter_(1, member_SK, 1)
        count_W = is_sent_SW.sum(0)
        if max_rows:
            send = receive = [0 if w in self.silent else max_rows for w in range(size)]
            w = torch.arange(size + 1, device=count_W.device)
            count_W = max_rows * ((w < self.silent.start) | (w >= self.silent.stop))
        else:
            both = torch.stack([count_W[:-1], self.group.all_to_all(count_W[:-1])])
            send, receive = both.tolist()
        count_W[-1] = 0
        place_SK = (is_sent_SW.cumsum(0) - 1).gather(1, member_SK)
        row_SK = (count_W.cumsum(0) - count_W)[member_SK] + place_SK
        return row_SK.masked_fill(place_SK >= count_W[member_SK], sum(send)), send, receive

    def _members(self, ids_RK: Tensor, num_own: int) -> Tensor:
        """Return the members that the rows go to, each once and ascending; size for no more."""
        nobody = self.group.size
        member_RK = (ids_RK - self.first).div(self.per_member, rounding_mode="floor")
        is_silent_RK = (member_RK < 0) | (member_RK >= nobody) | (member_RK == self.group.rank)
        is_same = (member_RK >= self.same.start) & (member_RK < self.same.stop)
        is_silent_RK[:num_own] |= is_same[:num_own]
        member_RK = member_RK.masked_fill(is_silent_RK, nobody).sort(dim=1).values
        is_repeated = member_RK[:, 1:] == member_RK[:, :-1]
        member_RK[:, 1:].masked_fill_(is_repeated, nobody)
        return member_RK


class ExpertDispatch:
    """Brings the tokens of a step to their experts, in all MoE layers of a model.

    Args:
        mesh: the ranks.
        num_slots: experts, or physical slots for them and their copies, over the whole world.
        settings: which form, and how tokens travel.

    Attributes:
        slots: by the prefix of each layer whose experts are placed; others' lie in equal ranges.
        position_T: as `begin_step` was told.
    """

    def __init__(
        self, mesh: Mesh, num_slots: int, settings: DispatchSettings | None = None
    ) -> None:
        self.settings = settings = settings or DispatchSettings()
        self.mesh, self._layout = mesh, mesh.layout
        self.slots: dict[str, ExpertSlots] = {}
        self._tokens: list[int] | None = None
        self.position_T: Tensor | None = None
        self._is_fixed = False
        tp, hosts, host = mesh.layout.tp, mesh.hosts, mesh.host
        each, first = num_slots // mesh.layout.ep, mesh.layout.dp_rank * tp
        # Outermost first: hosts, then ranks. One level where a tp group spans hosts.
        own, share = range(first, first + tp), (tp, mesh.layout.tp_rank)
        self._levels = [_Level(mesh.world, 0, each, own, share, settings)]
        if min(hosts.size, host.size) > 1 and host.size % tp == 0:
            here, first_rank = range(hosts.rank, hosts.rank + 1), hosts.rank * host.size
            own = range(own.start - first_rank, own.stop - first_rank)
            self._levels = [
                _Level(hosts, 0, each * host.size, here, share, settings),
                _Level(host, first_rank * each, each, own, share, settings, is_inner=True),
            ]

    def begin_step(
        self, tokens: Sequence[int] | None, fixed: bool = False, position_T: Tensor | None = None
    ) -> None:
        """Say how many tokens every dp group has in the coming step.

        Args:
            tokens: by dp group; None has them exchanged in every layer.
            fixed: shapes depend on `tokens` only, not on the routing (CUDA graphs).
            position_T: [T] of this group's tokens; those at -1 fill the step up and have no
                experts. None if there are no such ones.
        """
        assert tokens is not None or not fixed
        self._tokens = None if tokens is None else list(tokens)
        self._is_fixed, self.position_T = fixed, position_T

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
        tokens = self._tokens
        if tokens is None:
            mine = torch.tensor([len(x_TD)], device=x_TD.device)
            tokens = self.mesh.dp.all_gather(mine).flatten().tolist()
        assert tokens[self._layout.dp_rank] == len(x_TD), f"{tokens=} but {len(x_TD)} here"
        if self.form(tokens, rows) == "allreduce":
            return self._gather(rows, run, tokens)
        return self._send(rows, run, tokens)

    def form(self, tokens: Sequence[int], rows: Rows) -> str:
        """Return the form of a step of so many tokens in every dp group, `rows` in this one."""
        if self.settings.form != "auto":
            return self.settings.form
        layout, top_k, outer = self._layout, rows[1].shape[1], self._levels[0]
        share, others, worth = max(tokens) / layout.tp, layout.ep - layout.tp, 0
        if self._is_fixed:
            needed = others / layout.ep * outer.group.size * math.ceil(share)
        else:
            worth = _WORTH_BYTES[rows[0].device.type]
            needed = share * min(others * (1 - (1 - 1 / layout.ep) ** top_k), outer.reach(top_k))
        saved = 2 * (max(tokens) * (layout.dp - 1) - needed)
        return "alltoall" if saved * rows[0].shape[1] * rows[0].itemsize > worth else "allreduce"

    def _gather(self, rows: Rows, run: Run, tokens: Sequence[int]) -> Finish:
        """Run on the tokens of all dp groups; each gets its partial sums back."""
        count, dp, settings = len(rows[0]), self.mesh.dp, self.settings
        packed = F.pad(pack(rows, settings), (0, 0, 0, max(tokens) - count))
        every = torch.cat([g[:n] for g, n in zip(dp.all_gather(packed), tokens, strict=True)])

        def finish() -> Tensor:
            y_MD = run(*unpack(every, rows, settings)).to(rows[0].dtype)
            counts = [count] * dp.size
            back = dp.start_exchange(y_MD, list(tokens), counts, "combine").wait()
            y_TD = torch.zeros(rows[0].shape, dtype=torch.float32, device=y_MD.device)
            for part in back.split(counts):
                y_TD += part
            return y_TD

        return finish

    def _send(self, rows: Rows, run: Run, tokens: Sequence[int]) -> Finish:
        """Run on the tokens that chose this rank's experts, wherever they are."""
        share = -(-max(tokens) // self._layout.tp) if self._is_fixed else 0
        limits, count = (share, share * self._levels[0].group.size), len(rows[0])

        def at(level: int, run: Run, rows: Rows) -> Finish:
            return self._levels[level].start(rows, count, run, limits[level])

        if len(self._levels) == 1:
            return at(0, run, rows)
        return at(0, lambda *joined: at(1, run, joined)(), rows)
