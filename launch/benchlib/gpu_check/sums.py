"""Exchanges between ranks compared with their exact results, and their times.

    torchrun --nproc-per-node 2 -m benchlib.gpu_check.sums --rows FILE [--one-shot]

Over NCCL on GPUs, over Gloo on CPUs. Every rank makes all ranks' operands from the same seed. A
wrong result on any rank ends the program; the next run continues with the next case.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchlib.case_log import CaseLog
from benchlib.kernel_timing import median_seconds
from dsv3.distributed.collectives import Collectives
from dsv3.distributed.mesh import Mesh
from dsv3.errors import ConfigError, RankError
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from program import Parser, join_ranks, run_program, set_up_logging

_HIDDEN = 7168
_ROWS = (1, 8, 64, 2048)  # one-shot sums take at most 36 rows
_TOLERANCE = 2**-6
_EPS = 1e-6

Check = Callable[[Collectives, list[Tensor], torch.device], None]


def operands(size: int, rows: int) -> list[Tensor]:
    """Return the operands of all ranks: whole numbers, whose sums bf16 holds exactly."""
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, _HIDDEN)
    return [torch.randint(-8, 9, shape, generator=generator).bfloat16() for _ in range(size)]


def check_sum(group: Collectives, parts: list[Tensor], device: torch.device) -> None:
    """Raise if an all-reduce does not give the sum."""
    want = torch.stack(parts).float().sum(0)
    got = group.all_reduce(parts[group.rank].to(device, copy=True))
    assert_bitwise_equal("sum", got.cpu(), want.bfloat16())


def check_sum_norm(group: Collectives, parts: list[Tensor], device: torch.device) -> None:
    """Raise if an all-reduce fused with the residual and its norm is wrong."""
    weight = torch.full((_HIDDEN,), 0.5, device=device)
    want = torch.stack([*parts, parts[0]]).float().sum(0)
    y = parts[group.rank].to(device, copy=True)
    total, norm, _ = group.sum_norm(parts[0].to(device), y, weight, _EPS, False, False)
    assert_close("sum", total.float().cpu(), want, _TOLERANCE)
    want_norm = 0.5 * want * (want.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    assert_close("norm", norm.float().cpu(), want_norm, _TOLERANCE)


def check_gather(group: Collectives, parts: list[Tensor], device: torch.device) -> None:
    """Raise if an all-gather does not give all operands."""
    got = group.all_gather(parts[group.rank].to(device))
    assert_bitwise_equal("gathered", got.cpu(), torch.stack(parts))


def check_all_to_all(group: Collectives, parts: list[Tensor], device: torch.device) -> None:
    """Raise if an all-to-all changes a tensor: rank i sends operand i + r to rank r."""
    size = group.size
    rank = group.rank
    sent = torch.stack([parts[(rank + to) % size] for to in range(size)])
    want = torch.stack([parts[(source + rank) % size] for source in range(size)])
    assert_bitwise_equal("received", group.all_to_all(sent.to(device)).cpu(), want)


CHECKS: dict[str, Check] = {
    "all_reduce": check_sum,
    "sum_norm": check_sum_norm,
    "all_gather": check_gather,
    "all_to_all": check_all_to_all,
}


def exchange_seconds(group: Collectives, name: str, rows: int, device: torch.device) -> float:
    """Return the seconds of one exchange. A collective."""
    x = torch.zeros(rows, _HIDDEN, dtype=torch.bfloat16, device=device)
    weight = torch.ones(_HIDDEN, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": partial(group.all_reduce, x),
        "sum_norm": partial(group.sum_norm, x, x.clone(), weight, _EPS, False, False),
        "all_gather": partial(group.all_gather, x),
        "all_to_all": partial(group.all_to_all, x.expand(group.size, *x.shape).contiguous()),
    }
    return median_seconds([calls[name]], device)


def run_cases(mesh: Mesh, log: CaseLog) -> None:
    """Check every exchange at every size, and time it on GPUs. A collective; rank 0 has the log."""
    device = mesh.device
    for name, check in CHECKS.items():
        for rows in _ROWS:
            case = f"{name} {rows} x {_HIDDEN}"
            if case in log.begun:
                continue
            if mesh.layout.rank == 0:
                log.begin(case)
            try:
                check(mesh.world, operands(mesh.world.size, rows), device)
            except AssertionError as difference:
                raise RankError(f"{case}: {difference}") from difference
            figures = {}
            if device.type == "cuda":
                seconds = exchange_seconds(mesh.world, name, rows, device)
                rate = rows * _HIDDEN * 2 / seconds
                figures = {"exchange": case, "us": 1e6 * seconds, "GB/s": rate / 1e9}
            if mesh.layout.rank == 0:
                log.end(case, figures=figures)


def main() -> int:
    """Run the cases on all ranks."""
    parser = Parser(prog="benchlib.gpu_check.sums", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="file of JSON Lines")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--one-shot", action="store_true", help="small sums in memory that GPUs share"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args: argparse.Namespace = parser.parse_args(sys.argv[1:])
    set_up_logging(args.debug)
    log = CaseLog(args.rows, "--rows")  # all ranks read it before the first one writes
    with join_ranks(args.device, one_shot=args.one_shot) as mesh:
        if mesh.world.size == 1:
            raise ConfigError("there is one rank; start two or more with torchrun")
        run_cases(mesh, log)
    return 0


if __name__ == "__main__":
    run_program(main)
