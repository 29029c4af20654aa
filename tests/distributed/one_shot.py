"""Checks on every rank: sums in memory that ranks share."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.distributed import one_shot_group
from dsv3.distributed.collectives import ProcessGroup
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.one_shot_group import OneShotGroup, connect
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed.ranks import CPU
from tests.kernels.peers import make_memory, map_memory


class OneShotOnPaper(OneShotGroup):
    """A `OneShotGroup` whose kernel is replaced by Gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        ProcessGroup.__init__(self, group)
        self._shared, self.calls = torch.full((512 << 10,), 255, dtype=torch.uint8), 0

    def share(self) -> None:
        pass

    def _sum(self, shared: Tensor, x: Tensor) -> Tensor:
        assert shared.dtype == x.dtype and shared.data_ptr() == self._shared.data_ptr()
        self.calls += 1
        dist.all_reduce(shared.copy_(x), group=self.group)
        return shared.clone()


def world_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def check_one_shot(mesh: Mesh) -> None:
    group = OneShotOnPaper(world_group())
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


class NoMemory(OneShotOnPaper):
    """The memory of the last rank cannot be allocated."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        if self.rank == self.size - 1:
            raise RuntimeError("no such memory\nat some line of torch")


class NotShared(OneShotOnPaper):
    """Two ranks cannot map the memory of the others."""

    def share(self) -> None:
        if self.rank:
            raise RuntimeError("no handle")


def check_connect(mesh: Mesh) -> None:
    """Sums are one-shot only if asked for, and if all ranks of the group can share memory.

    One rank says why not.
    """
    rank, size, agree = mesh.world.rank, mesh.world.size, one_shot_group._first_failed
    gpu, last = torch.device("cuda", 0), size - 1
    cases: tuple[tuple[str, type[OneShotOnPaper], dict[str, Any], int | None], ...] = (
        ("not asked", OneShotOnPaper, {"one_shot": False}, None),
        ("by host", OneShotOnPaper, {"via_host": True}, None),
        ("two hosts", OneShotOnPaper, {"ranks_on_host": 1}, None),
        ("shared", OneShotOnPaper, {}, None),
        ("no peers", OneShotOnPaper, {}, last),
        ("no memory", NoMemory, {}, last),
        ("not shared", NotShared, {}, 1),
    )
    for case, kind, other, blamed in cases:
        with pytest.MonkeyPatch.context() as patch, logged() as lines:
            can_access = case != "no peers" or rank != last
            patch.setattr(torch.cuda, "device_count", lambda: 2)
            patch.setattr(torch.cuda, "can_device_access_peer", lambda *_, can=can_access: can)
            patch.setattr(one_shot_group, "OneShotGroup", lambda group, _, kind=kind: kind(group))
            patch.setattr(
                one_shot_group, "_first_failed", lambda group, _, failed: agree(group, CPU, failed)
            )
            how = {"via_host": False, "ranks_on_host": size, "one_shot": True} | other
            found = connect(world_group(), gpu, **how)
        assert isinstance(found, OneShotOnPaper) == (case == "shared"), case
        assert len(lines) == (rank == blamed), (case, lines)
        assert all("\n" not in line and "go on with NCCL" in line for line in lines)


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the warnings of a block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    one_shot_group.log.addHandler(handler)
    try:
        yield lines
    finally:
        one_shot_group.log.removeHandler(handler)


def check_sum_norm(mesh: Mesh) -> None:
    """One kernel for few rows, two for many: the same sums, and bytes are counted."""
    rank, size = mesh.world.rank, mesh.world.size
    group = OneShotOnPaper(world_group())
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
