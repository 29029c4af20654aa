"""Ranks that are processes, and memory of theirs that all of them have mapped: files.

Triton's interpreter runs kernels on it as on the memory of GPUs that read each other's: its atomics
are the processor's own, so flags work between processes.
"""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.config_files import DEMO
from dsv3.distributed.mesh import Mesh
from dsv3_kernels import Peers, shared_bytes, sum_norm
from dsv3_kernels.ops.rmsnorm import add_rmsnorm
from dsv3_kernels.ops.sum_norm import MAX_ROWS, sum_norm_of_parts
from dsv3_kernels.testing import assert_bitwise_equal
from tests.distributed.matrix import run_case
from tests.distributed.ranks import CPU

# Rows, columns, dtype of the parts: a row sits out some turns, and parts change their size.
STEPS = (
    (2, 256, torch.float32),
    (1, 100, torch.float32),
    (3, 384, torch.bfloat16),
    (3, 384, torch.float32),
    (1, 7, torch.bfloat16),
    (2, 128, torch.float32),
    (1, 256, torch.bfloat16),
)
SECONDS = 0.02


def make_memory(folder: Path, ranks: int, turn: int = 0) -> None:
    """Write every rank's memory: flags at `turn`, everything else NaN."""
    flags = torch.full((MAX_ROWS * ranks,), turn, dtype=torch.int32).view(torch.uint8)
    buffers = torch.full((shared_bytes(ranks) - len(flags),), 255, dtype=torch.uint8)
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        (folder / str(rank)).write_bytes(torch.cat((buffers, flags)).numpy().tobytes())


def map_memory(folder: Path, rank: int, ranks: int) -> tuple[Peers, list[Tensor]]:
    """Return the peers of a rank, and what must be kept as long as they are."""
    size, paths = shared_bytes(ranks), [str(folder / str(r)) for r in range(ranks)]
    shared = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]
    return Peers.at([memory.data_ptr() for memory in shared], rank, CPU), shared


def operands(step: int, ranks: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the residual, all ranks' parts and the weights; the same on every rank."""
    rows, dim, dtype = STEPS[step]
    rng = torch.Generator().manual_seed(step)
    x, *parts = (torch.randn(rows, dim, generator=rng) for _ in range(ranks + 1))
    return x, [part.to(dtype) for part in parts], torch.rand(dim, generator=rng) + 0.5


def disturb(patch: pytest.MonkeyPatch, is_slow: bool, how: str) -> None:
    """Let a rank read late, and remove a step that the kernel needs."""
    kernel = sys.modules["dsv3_kernels.ops.sum_norm"]
    wait = kernel._await

    def slow_wait(flags: object, turn: object, mask: object) -> None:
        if how != "no waiting":
            wait(flags, turn, mask)
        if is_slow:
            time.sleep(5 * SECONDS if how else SECONDS)

    patch.setattr(kernel, "_await", slow_wait)
    if how == "one buffer":
        patch.setattr(kernel, "_buffer", lambda row, turn, ROWS, BUFFER: row * BUFFER)


def count_wrong_sums(mesh: Mesh, folder: Path, how: str = "") -> int:
    """Launch without pause, one rank after the other late; compare with the reference's bits."""
    rank, size = mesh.tp.rank, mesh.tp.size
    peers, _shared = map_memory(folder, rank, size)
    given = [operands(step, size) for step in range(len(STEPS))]
    results, wrong = [], 0
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, rank == 0, how)
        for step, (x, parts, weight) in enumerate(given):
            if step % size == rank:
                time.sleep(SECONDS)
            quant = x.shape[1] % 128 == 0, step % 2 == 0
            results.append((sum_norm(x, parts[rank], weight, 1e-6, peers, *quant), quant))
    for ((total, h, q), quant), (x, parts, weight) in zip(results, given, strict=True):
        want = sum_norm_of_parts(x, parts, weight, 1e-6)[0]
        wrong += not torch.equal(total, want)
        if not how:
            _, want_h, want_q = add_rmsnorm.kernel(want, None, weight, 1e-6, *quant)
            assert_bitwise_equal("norm", h, want_h)
            if q is not None and want_q is not None:
                assert_bitwise_equal("q", q.q, want_q.q)
                assert_bitwise_equal("scale", q.scale, want_q.scale)
    return int(mesh.tp.all_reduce(torch.tensor(wrong)))


def check_sums(mesh: Mesh, folder: Path) -> None:
    """All ranks get the bits of the reference, whichever rank is late."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is poisoned
    assert count_wrong_sums(mesh, folder) == 0


def check_all(mesh: Mesh, folder: Path) -> None:
    """The test sees it if something is missing."""
    check_sums(mesh, folder)
    for how in ("no waiting", "one buffer"):
        assert count_wrong_sums(mesh, folder / how, how) > 0, how


def small_answers(mesh: Mesh) -> dict[str, list[int] | list[float]]:
    """Return the demo model's answers to a short prompt."""
    settings = {"kv_cache_size": "1024tok"}
    return run_case(mesh, str(DEMO), settings, prompts=[[1, 2, 3]], max_tokens=3)["answers"]


def check_answers(mesh: Mesh, folder: Path, want: dict[str, list[int]]) -> None:
    """A model whose ranks sum this way answers as on one rank."""
    mesh.tp.peers, shared = map_memory(folder, mesh.tp.rank, mesh.tp.size)
    got = small_answers(mesh)
    flags = shared[0][-4 * MAX_ROWS * mesh.tp.size :].view(torch.int32)
    assert flags[0] > 0 and flags[0] == flags[1], "rows were summed"
    if mesh.tp.rank == 0:
        assert {name: got[name] for name in want} == want
