"""Checks on every rank: dispatch, experts and combine equal the computation on one rank.

Each expert multiplies by its own matrix; the reference applies all experts to all tokens.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from benchlib.dispatch import dispatch_time
from dsv3.config import ParallelConfig, split_range
from dsv3.distributed.mesh import Mesh, make_mesh
from dsv3.model.moe import MoE
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch, StepTokens
from dsv3.parallel.token_rows import DispatchSettings, TokenRows
from dsv3.settings import DispatchVariant
from dsv3_kernels import act_quant, weight_dequant
from dsv3_kernels.fp8_format import FP8
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed.layers import CONFIG, FORMAT, filled
from tests.distributed.ranks import CPU, Check, alone

DIM, EXPERTS, TOP_K = 128, 16, 4
VARIANTS: tuple[DispatchVariant, ...] = ("allreduce", "alltoall")
Drawn = list[TokenRows]


class Experts:
    """The experts of one rank, and the number of rows they have processed."""

    def __init__(self, layout: ParallelConfig) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weight_EDD = torch.randn(EXPERTS, DIM, DIM, generator=generator) / DIM**0.5
        self.num_local = EXPERTS // layout.ep
        self.first = layout.ep_rank * self.num_local
        self.num_rows = 0

    def run(self, x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """Return the sums over this rank's experts."""
        assert len(x_MD) == len(ids_MK) == len(weight_MK)
        is_local = self.is_local(ids_MK)
        self.num_rows += int(is_local.any(1).sum())
        return self.all(x_MD, ids_MK, weight_MK * is_local)

    def is_local(self, ids_MK: Tensor) -> Tensor:
        return (ids_MK >= self.first) & (ids_MK < self.first + self.num_local)

    def all(self, x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """Return the sums over all experts."""
        y_MD = torch.zeros(x_MD.shape)
        for expert, weight_DD in enumerate(self.weight_EDD):
            share_M = (weight_MK * (ids_MK == expert)).sum(1)
            y_MD += share_M[:, None] * (x_MD.float() @ weight_DD)
        return y_MD


def routing(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """Return [T, K] ids, some of them adversarial."""
    if kind == "one expert":  # and no other
        ids = torch.full((tokens, TOP_K), -1)
        ids[:, 2] = 5
        return ids
    if kind == "last rank":
        return torch.arange(EXPERTS - TOP_K, EXPERTS).expand(tokens, -1).clone()
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if kind == "skewed":
        scores[:, EXPERTS // 2 :] *= 0.4
    return scores.topk(TOP_K).indices


def draw(kind: str, counts: list[int], dtype: torch.dtype = torch.float32) -> Drawn:
    """Return hidden states, ids and weights of every dp group, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(counts) + len(kind))
    return [
        TokenRows(
            x_MD=torch.randn(count, DIM, generator=generator).to(dtype),
            ids_MK=routing(kind, count, generator),
            weight_MK=torch.rand(count, TOP_K, generator=generator),
        )
        for count in counts
    ]


@contextmanager
def meshes(world: Mesh, tp: int, ranks_on_host: int) -> Iterator[Mesh]:
    size, rank = world.world.size, world.world.rank
    layout = ParallelConfig(world_size=size, rank=rank, tp=tp, dp=size // tp)
    mesh = make_mesh(layout, CPU, "gloo", False, [r // ranks_on_host for r in range(size)])
    try:
        yield mesh
    finally:
        mesh.close()


def checks(size: int) -> dict[str, Check]:
    """Return the checks of every layout of a world over tp ranks and hosts, by name."""
    found: dict[str, Check] = {}
    for tp, hosts in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
        if tp > size or hosts >= size or (hosts > 1 and tp == size):
            continue
        kinds: list[Check] = [check_routings, check_fixed]
        if tp < size:
            kinds += [check_bytes, check_fp8, check_auto]
        if CONFIG.n_routed_experts % size == 0:
            kinds.append(check_moe)
        if (size, tp, hosts) == (4, 2, 1):
            kinds.append(check_bench)
        for kind in kinds:
            name = kind.__name__.removeprefix("check_")
            found[f"{name} tp {tp} hosts {hosts}"] = partial(
                check_layout, check=kind, tp=tp, hosts=hosts
            )
    return found


def check_layout(world: Mesh, check: Check, tp: int, hosts: int) -> None:
    """Run a check on the world's ranks in a layout."""
    with meshes(world, tp, world.world.size // hosts) as mesh:
        assert (mesh.hosts.size == 1) == (hosts == 1)
        check(mesh)


def check_routings(mesh: Mesh) -> None:
    """Check both variants: groups without tokens, all tokens to one expert, ranks without any."""
    dp = mesh.layout.dp
    even = [8] * dp
    ragged = [(5 * g) % 7 for g in range(dp)]
    last = [0] * (dp - 1) + [33]
    cases = [(even, "random"), (even, "one expert"), (ragged, "skewed"), (ragged, "last rank")]
    cases += [(last, "one expert"), (last, "random"), ([0] * dp, "random")]
    kinds_of_steps: dict[DispatchVariant, list[str]] = {
        "allreduce": ["known"],
        "alltoall": ["known", "fixed", "unknown"],
    }
    for variant, steps in kinds_of_steps.items():
        dispatch = ExpertDispatch(mesh, EXPERTS, DispatchSettings(variant))
        for counts, kind in cases:
            for step in steps:
                tokens = StepTokens(None if step == "unknown" else counts, step == "fixed")
                case = f"{variant} {step} {kind} {counts}"
                check_step(dispatch, mesh, draw(kind, counts), case, tokens)


def check_step(
    dispatch: ExpertDispatch, mesh: Mesh, drawn: Drawn, case: str, tokens: StepTokens
) -> None:
    experts = Experts(mesh.layout)
    x, ids, weight = drawn[mesh.layout.dp_rank]
    given = x.clone(), ids.clone(), weight.clone()
    y = mesh.tp.all_reduce(dispatch(x, ids, weight, experts.run, tokens)())
    assert all(torch.equal(a, b) for a, b in zip(given, (x, ids, weight), strict=True))
    name = f"{case} tp {mesh.layout.tp} hosts {mesh.hosts.size}"
    assert y.dtype == torch.float32 and y.shape == x.shape, name
    assert_close(name, y, experts.all(x, ids, weight), 1e-5)
    # Every token that chose an expert of this rank was processed here exactly once.
    chosen = [experts.is_local(ids).any(1) for _, ids, _ in drawn]
    assert experts.num_rows == sum(int(c.sum()) for c in chosen), name


def check_fixed(mesh: Mesh) -> None:
    """Check static shapes: the same bits as with exact ones, and no value is read by the host.

    So CUDA graphs can contain both variants. Rows that pad a step are not sent.
    """
    dp = mesh.layout.dp
    experts = Experts(mesh.layout)

    def local(x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        return experts.all(x_MD, ids_MK, weight_MK * experts.is_local(ids_MK))

    for variant, kind in itertools.product(VARIANTS, ("random", "last rank")):
        drawn = draw(kind, [9] * dp)
        for _, ids, _ in drawn[1:]:  # padding; the last group has nothing else
            ids[3:] = -1
        drawn[-1][1].fill_(-1)
        dispatch = ExpertDispatch(mesh, EXPERTS, DispatchSettings(variant))
        parts: list[Tensor] = []
        for fixed in (True, False):
            tokens = StepTokens([9] * dp, fixed)
            before = [sent(mesh, name) for name in ("all_to_all", "all_reduce")]
            with no_host_reads() if fixed else nullcontext():
                parts.append(dispatch(*drawn[mesh.layout.dp_rank], local, tokens)())
            after = [sent(mesh, name) for name in ("all_to_all", "all_reduce")]
            assert (before == after) == (fixed or dp == 1 or variant == "allreduce")  # no counts
        assert_bitwise_equal("fixed and exact", parts[0], parts[1])
        check_step(dispatch, mesh, drawn, f"padded {variant}", tokens)


def refuse(*args: object) -> None:
    raise AssertionError("not possible in a CUDA graph: the host reads values")


@contextmanager
def no_host_reads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        yield


def sent(mesh: Mesh, name: str) -> list[int]:
    """Return the bytes that this rank has sent over the world and its parts."""
    return [group.sent[name] for group in (mesh.world, mesh.dp, mesh.hosts, mesh.host)]


def check_bytes(mesh: Mesh) -> None:
    """A token is sent to every destination once; FP8 takes little more than half the bytes."""
    layout, world = mesh.layout, mesh.world.size
    is_one_level = mesh.hosts.size == 1 or layout.tp > mesh.host.size
    counts = [3 + 2 * g for g in range(layout.dp)]
    own = range(layout.dp_rank * layout.tp, (layout.dp_rank + 1) * layout.tp)
    drawn = draw("random", counts, torch.bfloat16)
    rank_of = [(ids // (EXPERTS // world)).tolist() for _, ids, _ in drawn]
    start, stop = split_range(counts[layout.dp_rank], layout.tp, layout.tp_rank)
    destinations = [set(ranks) - set(own) for ranks in rank_of[layout.dp_rank][start:stop]]
    for fp8, row in ((False, 2 * DIM + 8 * TOP_K), (True, DIM + 4 + 8 * TOP_K)):
        settings = DispatchSettings("alltoall", FP8 if fp8 else None)
        dispatch = ExpertDispatch(mesh, EXPERTS, settings)
        before = [sent(mesh, name) for name in ("dispatch", "combine")]
        dispatch(*drawn[layout.dp_rank], Experts(layout).run, StepTokens(counts))()
        after = [sent(mesh, name) for name in ("dispatch", "combine")]
        (flat, _, hosts, host), (flat_back, *_) = (
            [b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)
        )
        if is_one_level:
            assert flat == row * sum(map(len, destinations))
            total = torch.tensor([flat // row, flat_back // (2 * DIM)])
            rows, back = mesh.world.all_reduce(total).tolist()
            assert rows == back > 0
        else:
            host_size = mesh.host.size
            own_host = mesh.hosts.rank
            other_hosts = [{r // host_size for r in ranks} - {own_host} for ranks in destinations]
            within_host = forwarded(mesh, rank_of, counts) + [
                {r for r in ranks if r // host_size == own_host} for ranks in destinations
            ]
            assert hosts == row * sum(map(len, other_hosts))
            assert host == row * sum(map(len, within_host))


def forwarded(mesh: Mesh, rank_of: list[list[list[int]]], counts: list[int]) -> list[set[int]]:
    """Return the ranks to which this one forwards each token received from other hosts."""
    layout, host_size = mesh.layout, mesh.host.size
    destinations = []
    for host in range(mesh.hosts.size):
        sender = host * host_size + mesh.host.rank
        if host == mesh.hosts.rank:
            continue
        group = sender // layout.tp
        start, stop = split_range(counts[group], layout.tp, sender % layout.tp)
        for ranks in rank_of[group][start:stop]:
            on_host = {r for r in ranks if r // host_size == mesh.hosts.rank}
            destinations.append(on_host - {layout.rank})
    return destinations


def check_fp8(mesh: Mesh) -> None:
    """Experts of other tp groups get rounded hidden states, those of the own group exact ones."""
    layout = mesh.layout
    own_ranks = torch.arange(layout.dp_rank * layout.tp, (layout.dp_rank + 1) * layout.tp)
    counts = [6 + g for g in range(layout.dp)]
    x, ids, weight = draw("random", counts)[layout.dp_rank]
    experts = Experts(layout)
    is_own = torch.isin(ids // experts.num_local, own_ranks)
    rounded = weight_dequant(*act_quant(x), torch.float32, block=(1, 128))
    want = experts.all(x, ids, weight * is_own) + experts.all(rounded, ids, weight * ~is_own)
    dispatch = ExpertDispatch(mesh, EXPERTS, DispatchSettings("alltoall", FP8))
    got = mesh.tp.all_reduce(dispatch(x, ids, weight, experts.run)())
    # Rows sent over two levels are rounded twice, to the same e4m3 values.
    assert_close("fp8", got, want, 1e-5)
    assert (got - experts.all(x, ids, weight)).abs().max() > 1e-3
    got = mesh.tp.all_reduce(
        ExpertDispatch(mesh, EXPERTS, DispatchSettings("allreduce", FP8))(
            x, ids, weight, experts.run
        )()
    )
    assert_close("fp8 gathered", got, experts.all(rounded, ids, weight), 1e-5)
    halved = draw("random", counts, torch.bfloat16)[layout.dp_rank]
    for variant in VARIANTS:
        dispatch = ExpertDispatch(mesh, EXPERTS, DispatchSettings(variant))
        got = mesh.tp.all_reduce(dispatch(*halved, experts.run)())
        assert_close(f"bfloat16 {variant}", got, experts.all(*halved), 2e-2)


def check_auto(mesh: Mesh) -> None:
    """All ranks choose the same: gathering for few tokens, all-to-all if that saves bytes."""
    dispatch = ExpertDispatch(mesh, EXPERTS)
    one = draw("random", [1])[0]
    wide = TokenRows(torch.empty(0, 1 << 20), one.ids_MK, one.weight_MK)
    dp = mesh.layout.dp
    assert dispatch.variant([1] * dp, one) == "allreduce"
    assert dispatch.variant([1 << 20] * dp, wide) == "alltoall"


def check_moe(mesh: Mesh) -> None:
    """The layer with its shared expert: every dp group's result equals that of one rank."""
    config = dataclasses.replace(CONFIG, topk_group=3)

    def make(mesh: Mesh, variant: DispatchVariant) -> MoE:
        dispatch = ExpertDispatch(mesh, config.n_routed_experts, DispatchSettings(variant))
        side = SideStream(FORMAT.device)
        moe = MoE(config, "model.layers.1.mlp.", mesh.layout, FORMAT, dispatch, side)
        return filled(moe, mesh, config)

    count = 4 + mesh.layout.dp_rank
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, CONFIG.hidden_size, generator=generator)
    want = make(alone(), "auto")(x)
    for variant in VARIANTS:
        assert_close(f"moe {variant}", mesh.tp.all_reduce(make(mesh, variant)(x)), want, 1e-5)


def check_bench(mesh: Mesh) -> None:
    """Two groups of two ranks: a token is gathered by two ranks, or sent to at most two."""
    config = dataclasses.replace(CONFIG, hidden_size=DIM, topk_group=3)
    report = dispatch_time(mesh, config, torch.bfloat16, [3, 8], repeats=1)
    rows = {(row["form"], row["tokens"]): row for row in report.rows}
    assert [len(report.series), len(rows)] == [5, 10] and all(r["ms"] > 0 for r in report.rows)
    row_bytes = 2 * DIM + 8 * config.num_experts_per_tok
    for tokens in (3, 8):
        gathered, sent = rows["allreduce", tokens], rows["alltoall", tokens]
        assert (gathered["out B/token"], gathered["back B/token"]) == (2 * row_bytes, 4 * DIM)
        assert 0 < sent["out B/token"] <= 2 * row_bytes
        assert gathered["sum B/token"] == sent["sum B/token"] == 2 * 4 * DIM
        in_fp8 = rows["alltoall fp8", tokens]["out B/token"]
        assert in_fp8 < 0.6 * sent["out B/token"]
