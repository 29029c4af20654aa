"""Checks on every rank: sums in memory that ranks share."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.distributed import collectives
from dsv3.distributed.collectives import OneShotGroup, ProcessGroup
from dsv3.distributed.mesh import Mesh
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed.ranks import CPU
from tests.kernels.peers import make_memory, map_memory


class OneShotOnPaper(OneShotGroup):
    """A `OneShotGroup` whose kernel is replaced by Gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        ProcessGroup.__init__(self, group)
        self._shared, self.calls = torch.full((512 << 10,), 255, dtype=torch.uint8), 0

    def _sum(self, shared: Tensor, x: Tensor) -> Tensor:
        assert shared.dtype == x.dtype and shared.data_ptr() == self._shared.data_ptr()
        self.calls += 1
        dist.all_reduce(shared.copy_(x), group=self.group)
        return shared.clone()


def check_one_shot(mesh: Mesh) -> None:
    group = OneShotOnPaper(mesh.world.group)
    cases = [((3, 8), torch.bfloat16, 1), ((128, 1024), torch.float32, 1), ((5,), torch.float32, 0)]
    cases += [((129, 1024), torch.float32, 0), ((4, 4), torch.int64, 0)]
    for shape, dtype, calls in cases:
        group.calls = 0
        x = (torch.arange(4).repeat(*shape)[..., : shape[-1]] + mesh.world.rank).to(dtype)
        want = mesh.world.all_reduce(x.clone())
        # A result is not overwritten by the next exchange.
        got = [group.all_reduce(x.clone()) for _ in range(2)]
        assert_bitwise_equal("sum", got[0], want)
        assert_bitwise_equal("sum of a transposed one", group.all_reduce(x.t()), want.t())
        assert group.calls == 3 * calls, f"{shape} {dtype}"


def check_connect(mesh: Mesh) -> None:
    """If the memory of one rank cannot be shared, all ranks use the usual group."""
    agree, failing = collectives._all_agree, mesh.world.rank == mesh.world.size - 1

    def one_shot(group: dist.ProcessGroup, _device: torch.device) -> ProcessGroup:
        if failing and case == "refused":
            raise RuntimeError("no such memory")
        return OneShotOnPaper(group)

    def can_access(*_: object) -> bool:
        return not (failing and case == "no peers")

    for case in ("shared", "no peers", "refused"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 2)
            patch.setattr(torch.cuda, "can_device_access_peer", can_access)
            patch.setattr(collectives, "OneShotGroup", one_shot)
            patch.setattr(collectives, "_all_agree", lambda group, _, ok: agree(group, CPU, ok))
            size = mesh.world.size
            found = collectives.connect(mesh.world.group, torch.device("cuda", 0), False, size)
        assert isinstance(found, OneShotOnPaper) == (case == "shared"), case


def check_sum_norm(mesh: Mesh) -> None:
    """One kernel for few rows, two for many: the same sums, and bytes are counted."""
    rank, size = mesh.world.rank, mesh.world.size
    group = OneShotOnPaper(mesh.world.group)
    with tempfile.TemporaryDirectory() as folder:
        make_memory(Path(folder), size)
        places = [folder]
        dist.broadcast_object_list(places, group=group.group)
        group.peers, _shared = map_memory(Path(places[0]), rank, size)
        dist.barrier(group.group)
    cases = [((3, 256), torch.float32, 0), ((1, 100), torch.bfloat16, 0), ((2, 4), torch.int64, 0)]
    for shape, dtype, calls in [*cases, ((65, 8), torch.float32, 1), ((2, 128), torch.float32, 0)]:
        group.calls, group.sent["all_reduce"] = 0, 0
        x = torch.arange(4.0).repeat(*shape)[..., : shape[-1]]
        y, quant = (x + rank).to(dtype), shape[-1] % 128 == 0
        norm = torch.rand(shape[-1], generator=torch.Generator().manual_seed(0)), 1e-6, quant, True
        want = mesh.world.sum_norm(x, y.clone(), *norm)
        got = group.sum_norm(x, y.clone(), *norm)
        assert_bitwise_equal("sum", got[0], want[0])
        assert_close("norm", got[1], want[1], 1e-6)
        assert (got[2] is not None) == quant and group.calls == calls, f"{shape} {dtype}"
        parts = size - 1 if dtype != torch.int64 else 2 - 2 / size
        assert group.sent["all_reduce"] == round(parts * y.nbytes)
