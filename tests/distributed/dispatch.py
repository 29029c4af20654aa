"""What every rank checks: dispatch, experts and combine give what one rank computes for all.

An expert multiplies by a matrix of its own; the reference applies all of them to all tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv3.config import ParallelConfig
from dsv3.parallel.experts import DispatchSettings, ExpertDispatch
from dsv3.parallel.mesh import Mesh, make_mesh
from dsv3_kernels.testing import assert_close
from tests.distributed.ranks import CPU, alone

DIM, EXPERTS, TOP_K = 128, 16, 4


class Experts:
    """The experts of one rank; counts what they were given."""

    def __init__(self, layout: ParallelConfig) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weight_EDD = torch.randn(EXPERTS, DIM, DIM, generator=generator) / DIM**0.5
        self.num_local = EXPERTS // layout.ep
        self.first = layout.ep_rank * self.num_local
        self.num_rows = 0

    def run(self, x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """Only this rank's experts."""
        assert len(x_MD) == len(ids_MK) == len(weight_MK)
        is_local = (ids_MK >= self.first) & (ids_MK < self.first + self.num_local)
        self.num_rows += int(is_local.any(1).sum())
        return self.all(x_MD, ids_MK, weight_MK * is_local)

    def all(self, x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """The definition."""
        y_MD = torch.zeros(x_MD.shape)
        for expert, weight_DD in enumerate(self.weight_EDD):
            share_M = (weight_MK * (ids_MK == expert)).sum(1)
            y_MD += share_M[:, None] * (x_MD.float() @ weight_DD)
        return y_MD


def routing(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """Return [T, K] ids, some of them adversarial."""
    if kind == "one expert":  # and nobody else: the others are -1
        ids = torch.full((tokens, TOP_K), -1)
        ids[:, 2] = 5
        return ids
    if kind == "last rank":
        return torch.arange(EXPERTS - TOP_K, EXPERTS).expand(tokens, -1).clone()
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if kind == "skewed":
        scores[:, EXPERTS // 2 :] *= 0.4
    return scores.topk(TOP_K).indices


KINDS = ("random", "skewed", "one expert", "last rank")


def draw(kind: str, counts: list[int], dtype: torch.dtype = torch.float32) -> list[tuple]:
    """Return hidden states, ids and weights of every dp group, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(counts) + len(kind))
    return [
        (
            torch.randn(count, DIM, generator=generator).to(dtype),
            routing(kind, count, generator),
            torch.rand(count, TOP_K, generator=generator),
        )
        for count in counts
    ]


@contextmanager
def meshes(world: Mesh, tp: int, ranks_on_host: int) -> Iterator[Mesh]:
    size, rank = world.world.size, world.world.rank
    layout = ParallelConfig(world_size=size, rank=rank, tp=tp, dp=size // tp)
    mesh = make_mesh(layout, CPU, "gloo", False, ranks_on_host)
    try:
        yield mesh
    finally:
        mesh.close()


def token_counts(dp: int) -> list[list[int]]:
    """Even, ragged, groups without a token."""
    return [[8] * dp, [(5 * g) % 7 for g in range(dp)], [0] * (dp - 1) + [33]]


def check_all(world: Mesh) -> None:
    size = world.world.size
    for tp in (1, 2, 4, 8):
        for ranks_on_host in (size, size // 2):
            if tp <= size:
                with meshes(world, tp, ranks_on_host) as mesh:
                    check_layout(mesh)


def check_one_rank() -> None:
    check_layout(alone())


def check_layout(mesh: Mesh) -> None:
    """All forms, at all routings and numbers of tokens."""
    for form, steps in (("allreduce", ["known"]), ("alltoall", ["known", "fixed", "unknown"])):
        dispatch = ExpertDispatch(mesh, EXPERTS, DispatchSettings(form=form, capacity_factor=1))
        for counts in token_counts(mesh.layout.dp):
            for kind in KINDS:
                for step in steps:
                    dispatch.begin_step(None if step == "unknown" else counts, step == "fixed")
                    check_step(dispatch, mesh, kind, counts, f"{form} {step}")


def check_step(
    dispatch: ExpertDispatch, mesh: Mesh, kind: str, counts: list[int], what: str
) -> None:
    experts = Experts(mesh.layout)
    drawn = draw(kind, counts)
    x, ids, weight = drawn[mesh.layout.dp_rank]
    given = x.clone(), ids.clone(), weight.clone()
    y = mesh.tp.all_reduce(dispatch(x, ids, weight, experts.run)())
    assert all(torch.equal(a, b) for a, b in zip(given, (x, ids, weight), strict=True))
    name = f"{what} {kind} {counts} tp {mesh.layout.tp} hosts {mesh.hosts.size}"
    assert y.dtype == torch.float32 and y.shape == x.shape, name
    assert_close(name, y, experts.all(x, ids, weight), 1e-5)
    # Every token was run here exactly once if it chose an expert of this rank.
    chosen = [((i >= experts.first) & (i < experts.first + experts.num_local)) for _, i, _ in drawn]
    assert experts.num_rows == sum(int(c.any(1).sum()) for c in chosen), name
