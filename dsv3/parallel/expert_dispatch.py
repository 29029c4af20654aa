"""Expert dispatch and combine: tokens are sent to the ranks of their experts, and results back.

Each rank has an equal contiguous range of the (physical) experts; the tokens of a dp group are on
all of its tp ranks, and the caller sums over tp. Two variants compute the same sum:

* `allreduce`: every rank gets every token (tokens of other dp groups are gathered) and runs its
  experts on the tokens that chose them; the partial sums are added on the tokens' own ranks.
* `alltoall`: a token is sent once to every rank outside its tp group that has any of its experts,
  by one rank of its tp group (the ranks of a tp group share the tokens); one partial sum per
  destination is sent back.

With several hosts, a token is sent once to every host that has any of its experts (to the rank with
the same index there), and that rank distributes it within the host: two levels of exchange.

In steps of static shape (CUDA graphs) every destination has room for all rows. On one level this
sends as many bytes as gathering, so `auto` chooses `allreduce`; between hosts it sends fewer.

Letters: W members of a group, R rows on this member, S the rows of R that it may send.
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
from dsv3.parallel.physical_experts import PhysicalExperts
from dsv3.parallel.token_rows import (
    DispatchSettings,
    TokenRows,
    deserialize_rows,
    serialize_rows,
)

# (x_MD, ids_MK, weight_MK) -> [M, D] float32: the weighted sums of this rank's experts. Ids of
# other ranks' experts are skipped.
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
# Waits for an exchange and returns [T, D] float32.
Combine = Callable[[], Tensor]
# By device: bytes that an all-to-all of exact sizes must save on each rank to be worth its exchange
# of counts. Gloo: measured, eight ranks of V3's width on two cores break even between 16 and 32
# tokens per dp group (1.4 and 2.8 MB). NCCL: not measured, 60 us at 300 GB/s.
_MIN_SAVED_BYTES = {"cpu": 2 << 20, "cuda": 18 << 20}


@dataclass(frozen=True)
class _Level:
    """An exchange among the members of one group.

    Attributes:
        group: the members.
        first_expert: the first expert of the first member.
        experts_per_member: experts of each member; member m has those from
            first_expert + m * experts_per_member on.
        own_members: members that have this rank's own rows anyway, this one among them.
        num_shares: parts into which the tp ranks split their rows.
        share: this rank's part.
        settings: dtype of rows, and groups of experts.
        is_inner: the level within a host, which also forwards rows received from other hosts.
    """

    group: Collectives
    first_expert: int
    experts_per_member: int
    own_members: range
    num_shares: int
    share: int
    settings: DispatchSettings
    is_inner: bool = False

    @property
    def skipped_members(self) -> range:
        """The members to which this one sends no rows."""
        if self.is_inner:
            return range(self.group.rank, self.group.rank + 1)
        return self.own_members

    def reach(self, top_k: int) -> int:
        """Return the maximal number of members that a token is sent to.

        A group of experts is on few members, and a token chooses from few groups.
        """
        size = self.group.size
        if self.is_inner:
            return min(top_k, size)
        num_groups, num_chosen = self.settings.groups
        return min(top_k, size, num_chosen * -(-size // num_groups))

    def start(self, rows_R: TokenRows, num_own: int, run: RunExperts, max_rows: int) -> Combine:
        """Send rows to the members that have their experts.

        Args:
            rows_R: rows on this member; ids outside of the group's experts are skipped.
            num_own: the first `num_own` rows are those of the dp group.
            run: called with all rows for this member; returns their partial sums, in float32.
            max_rows: maximal number of rows that a member sends to another one, for static shapes;
                0 for exact numbers.

        Returns:
            A function that completes the exchange and returns this rank's part of the sums.
        """
        index_R = torch.arange(len(rows_R.x_MD), device=rows_R.x_MD.device)
        start, stop = split_range(num_own, self.num_shares, self.share)
        source_S = torch.cat([index_R[start:stop], index_R[num_own:]])
        member_SK = self._members(rows_R.ids_MK, num_own)[source_S]
        row_SK, send, receive = self._arrange(member_SK, max_rows)
        source_M = torch.full((sum(send) + 1,), len(index_R), device=index_R.device)
        source_M.scatter_(0, row_SK.flatten(), source_S.repeat_interleave(row_SK.shape[1]))
        source_M = source_M[:-1]
        # In static shapes, unused rows of the buffer read a row past the end, without experts.
        padded_R = rows_R
        if max_rows:
            padded_R = TokenRows(*(F.pad(part, (0, 0, 0, 1), value=-1) for part in rows_R))
        sent_M = TokenRows(*(part[source_M] for part in padded_R))
        data = serialize_rows(sent_M, self.settings)
        pending = self.group.start_exchange(data, send, receive, "dispatch")

        def combine() -> Tensor:
            received = deserialize_rows(pending.wait(), rows_R, self.settings)
            x, ids, weight = (torch.cat(pair) for pair in zip(rows_R, received, strict=True))
            y_RD, y_MD = run(x, ids, weight).split([len(index_R), sum(receive)])
            y_MD = y_MD.to(x.dtype)
            back_MD = self.group.start_exchange(y_MD, receive, send, "combine").wait()
            # Summed in the order of the members; destinations not used read a row past the end.
            table_MD = F.pad(back_MD.float(), (0, 0, 0, 1))
            sums_SD = F.embedding_bag(row_SK, table_MD, mode="sum", padding_idx=len(back_MD))
            y_RD[source_S] += sums_SD
            return y_RD

        return combine

    def _arrange(self, member_SK: Tensor, max_rows: int) -> tuple[Tensor, list[int], list[int]]:
        """Assign rows of the send buffer.

        In static shapes there is room for all rows at every member, so no row is dropped.

        Args:
            member_SK: result of `_members`.
            max_rows: see `start`.

        Returns:
            row_SK: rows of the send buffer; its length where member_SK is the group's size.
            send: number of rows for each member.
            receive: number of rows from each member.
        """
        size = self.group.size
        is_sent_SW = member_SK.new_zeros(len(member_SK), size + 1).scatter_(1, member_SK, 1)
        count_W = is_sent_SW.sum(0)
        if max_rows:
            skipped = self.skipped_members
            send = [0 if w in skipped else max_rows for w in range(size)]
            receive = send
            w = torch.arange(size + 1, device=count_W.device)
            count_W = max_rows * ((w < skipped.start) | (w >= skipped.stop))
        else:
            counts = torch.stack([count_W[:-1], self.group.all_to_all(count_W[:-1])])
            send, receive = counts.tolist()
        count_W[-1] = 0
        index_SK = (is_sent_SW.cumsum(0) - 1).gather(1, member_SK)
        row_SK = (count_W.cumsum(0) - count_W)[member_SK] + index_SK
        row_SK = row_SK.masked_fill(index_SK >= count_W[member_SK], sum(send))
        return row_SK, send, receive

    def _members(self, ids_RK: Tensor, num_own: int) -> Tensor:
        """Return the members each row is sent to, [R, K] ascending, each once; then the size."""
        none = self.group.size
        member_RK = ids_RK - self.first_expert
        member_RK = member_RK.div(self.experts_per_member, rounding_mode="floor")
        is_skipped_RK = (member_RK < 0) | (member_RK >= none) | (member_RK == self.group.rank)
        is_own = (member_RK >= self.own_members.start) & (member_RK < self.own_members.stop)
        is_skipped_RK[:num_own] |= is_own[:num_own]
        member_RK = member_RK.masked_fill(is_skipped_RK, none).sort(dim=1).values
        is_repeated = member_RK[:, 1:] == member_RK[:, :-1]
        member_RK[:, 1:].masked_fill_(is_repeated, none)
        return member_RK


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Number of tokens of a step, which the shapes of the exchanges follow from.

    Attributes:
        per_group: by dp group; None: the ranks exchange the numbers in every layer.
        is_static: shapes depend on `per_group` only, not on the routing (CUDA graphs).
        position_T: [T] int64 positions of this group's tokens; -1 for tokens that pad the step and
            have no experts. None without padding.
    """

    per_group: Sequence[int] | None = None
    is_static: bool = False
    position_T: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that static shapes have numbers to depend on."""
        assert self.per_group is not None or not self.is_static


_UNKNOWN = StepTokens()


class ExpertDispatch:
    """Sends the tokens of a step to their experts and combines results, for all MoE layers.

    Args:
        mesh: the ranks.
        num_physical: physical experts (experts and their copies) of the whole world.
        settings: variant and dtype of the exchange.

    Attributes:
        physical_experts: by the prefix of each layer with an expert placement; in other layers the
            experts are in equal ranges.
    """

    def __init__(
        self, mesh: Mesh, num_physical: int, settings: DispatchSettings | None = None
    ) -> None:
        self.settings = settings or DispatchSettings()
        self.mesh = mesh
        self.physical_experts: dict[str, PhysicalExperts] = {}
        self._layout = mesh.layout
        self._levels = self._make_levels(num_physical // mesh.layout.ep)

    def _make_levels(self, experts_per_rank: int) -> list[_Level]:
        """Return the levels of the exchange, outermost first: hosts, then ranks of a host.

        There is one level if a tp group spans hosts, or if there is one host, or one rank per host.
        """
        tp = self._layout.tp
        tp_rank = self._layout.tp_rank
        first_rank = self._layout.dp_rank * tp
        hosts = self.mesh.hosts
        host = self.mesh.host
        if min(hosts.size, host.size) == 1 or host.size % tp:
            return [
                _Level(
                    group=self.mesh.world,
                    first_expert=0,
                    experts_per_member=experts_per_rank,
                    own_members=range(first_rank, first_rank + tp),
                    num_shares=tp,
                    share=tp_rank,
                    settings=self.settings,
                )
            ]
        first_on_host = hosts.rank * host.size
        between_hosts = _Level(
            group=hosts,
            first_expert=0,
            experts_per_member=experts_per_rank * host.size,
            own_members=range(hosts.rank, hosts.rank + 1),
            num_shares=tp,
            share=tp_rank,
            settings=self.settings,
        )
        within_host = _Level(
            group=host,
            first_expert=first_on_host * experts_per_rank,
            experts_per_member=experts_per_rank,
            own_members=range(first_rank - first_on_host, first_rank - first_on_host + tp),
            num_shares=tp,
            share=tp_rank,
            settings=self.settings,
            is_inner=True,
        )
        return [between_hosts, within_host]

    def __call__(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weight_TK: Tensor,
        run: RunExperts,
        step: StepTokens = _UNKNOWN,
    ) -> Combine:
        """Send tokens to their experts. The caller may do other work before it calls the result.

        Args:
            x_TD: [T, D] hidden states, the same on all tp ranks of a dp group.
            ids_TK: [T, K] int64 physical experts; -1 for none.
            weight_TK: [T, K] float32.
            run: see `RunExperts`.
            step: tokens of all dp groups.

        Returns:
            A function that returns [T, D] float32; its sum over tp is the layer's output.
        """
        rows = TokenRows(x_TD, ids_TK, weight_TK)
        if self._layout.dp == 1:
            return lambda: run(x_TD, ids_TK, weight_TK)
        tokens = step.per_group
        if tokens is None:
            count = torch.tensor([len(x_TD)], device=x_TD.device)
            tokens = self.mesh.dp.all_gather(count).flatten().tolist()
        assert tokens[self._layout.dp_rank] == len(x_TD), f"{tokens=} but {len(x_TD)} here"
        if self.variant(tokens, rows, step.is_static) == "allreduce":
            return self._gather(rows, run, tokens)
        return self._send(rows, run, tokens, step.is_static)

    def variant(self, tokens: Sequence[int], rows: TokenRows, is_static: bool = False) -> str:
        """Return "allreduce" or "alltoall" for a step.

        Args:
            tokens: number of tokens of all dp groups.
            rows: those of this group.
            is_static: see `StepTokens`.
        """
        if self.settings.variant != "auto":
            return self.settings.variant
        layout = self._layout
        outer = self._levels[0]
        tokens_per_rank = max(tokens) / layout.tp
        num_others = layout.ep - layout.tp
        if is_static:
            min_saved_bytes = 0
            num_sent = num_others / layout.ep * outer.group.size * math.ceil(tokens_per_rank)
        else:
            min_saved_bytes = _MIN_SAVED_BYTES[rows.x_MD.device.type]
            top_k = rows.ids_MK.shape[1]
            expected_members = num_others * (1 - (1 - 1 / layout.ep) ** top_k)
            num_sent = tokens_per_rank * min(expected_members, outer.reach(top_k))
        num_gathered = max(tokens) * (layout.dp - 1)
        # Rows are sent twice: dispatch and combine.
        saved_bytes = 2 * (num_gathered - num_sent) * rows.x_MD.shape[1] * rows.x_MD.itemsize
        return "alltoall" if saved_bytes > min_saved_bytes else "allreduce"

    def _gather(self, rows: TokenRows, run: RunExperts, tokens: Sequence[int]) -> Combine:
        """Run this rank's experts on the tokens of all dp groups; return the partial sums."""
        count = len(rows.x_MD)
        dp = self.mesh.dp
        padding = max(tokens) - count
        data = F.pad(serialize_rows(rows, self.settings), (0, 0, 0, padding))
        gathered = dp.all_gather(data)
        all_data = torch.cat([part[:n] for part, n in zip(gathered, tokens, strict=True)])

        def combine() -> Tensor:
            x, ids, weight = deserialize_rows(all_data, rows, self.settings)
            y_MD = run(x, ids, weight).to(rows.x_MD.dtype)
            counts = [count] * dp.size
            back = dp.start_exchange(y_MD, list(tokens), counts, "combine").wait()
            y_TD = torch.zeros(rows.x_MD.shape, dtype=torch.float32, device=y_MD.device)
            for part in back.split(counts):
                y_TD += part
            return y_TD

        return combine

    def _send(
        self, rows: TokenRows, run: RunExperts, tokens: Sequence[int], is_static: bool
    ) -> Combine:
        """Send tokens to the ranks of their experts."""
        count = len(rows.x_MD)
        max_rows = -(-max(tokens) // self._layout.tp) if is_static else 0
        outer = self._levels[0]
        if len(self._levels) == 1:
            return outer.start(rows, count, run, max_rows)
        inner = self._levels[1]

        def run_on_host(x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
            joined = TokenRows(x_MD, ids_MK, weight_MK)
            return inner.start(joined, count, run, max_rows * outer.group.size)()

        return outer.start(rows, count, run_on_host, max_rows)
