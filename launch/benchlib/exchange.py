"""Latency and bandwidth of the exchanges between ranks, by operation and size."""

import argparse
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchlib.flags import at_least
from benchlib.report import Report, Row
from common import tune_process
from dsv3.distributed.collectives import Collectives, library_group
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.one_shot_group import OneShotGroup
from dsv3.distributed.shared_memory import MemoryGroup
from dsv3.errors import ConfigError
from program import join_ranks

log = logging.getLogger("dsv3")

_NAMES = {MemoryGroup: "memory", OneShotGroup: "one-shot"}
_LONGEST_SECONDS = 0.02  # of the calls that are timed together
_MOST_CALLS = 200
_ROW_LEN = 16  # elements; a tensor has rows for an uneven exchange between all ranks

Operation = Callable[[Collectives, Tensor], object]


def _exchange(group: Collectives, x: Tensor) -> Tensor:
    """Run an uneven all-to-all in which rank r gets r + 1 shares of every rank's rows."""
    shares = range(1, group.size + 1)
    share = len(x) // sum(shares)
    assert share, f"{len(x)=} are too few rows for {group.size} ranks"
    send = [n * share for n in shares]
    receive = [send[group.rank]] * group.size
    return group.start_exchange(x[: sum(send)], send, receive, "uneven").wait()


OPERATIONS: Mapping[str, Operation] = {
    "all_reduce": lambda group, x: group.all_reduce(x),
    "all_gather": lambda group, x: group.all_gather(x[: len(x) // group.size]),
    "reduce_scatter": lambda group, x: group.reduce_scatter(x),
    "all_to_all": lambda group, x: group.all_to_all(x.unflatten(0, (group.size, -1))),
    "uneven": _exchange,
    "broadcast": lambda group, x: group.broadcast(x),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    sizes = [1 << 10, 16 << 10, 256 << 10, 4 << 20]
    text = "sizes of the whole tensor"
    add("--bytes", type=at_least(1), nargs="+", default=sizes, help=text)
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--repeats", type=at_least(1), default=9, help="timed runs of each")


def run(args: argparse.Namespace) -> Report | None:
    """Time the exchanges of all ranks; rank 0 returns the report."""
    with join_ranks(args.device) as mesh:
        if mesh.world.size == 1:
            raise ConfigError("exchange needs several ranks: torchrun --nproc-per-node 2 ...")
        tune_process(mesh)
        report = exchange_time(mesh, args.bytes, args.repeats)
        report.setting = {"ranks": mesh.layout.world_size}
        return report if mesh.layout.rank == 0 else None


@torch.inference_mode()
def exchange_time(mesh: Mesh, sizes: Sequence[int], repeats: int) -> Report:
    """Time every operation over all ranks in every form that they have. A collective.

    Args:
        mesh: the ranks, at least two.
        sizes: bytes of the whole tensor: of the operand, or of the result of an all-gather.
        repeats: timed runs of each; forms take turns, and the report has their medians.
    """
    library = library_group()
    groups: dict[str, Collectives] = {library.backend: library}
    if type(mesh.world) in _NAMES:
        groups = {_NAMES[type(mesh.world)]: mesh.world} | groups
    report = Report("exchange", x_label="bytes", y_label="us")
    for size in sizes:
        log.info("exchange: %s bytes", f"{size:,}")
        for operation, run in OPERATIONS.items():
            report.rows += _compare(groups, operation, run, mesh, size, repeats)
    for operation in OPERATIONS:
        for form in groups:
            ours = [r for r in report.rows if (r["operation"], r["form"]) == (operation, form)]
            series = [row["bytes"] for row in ours], [row["us"] for row in ours]
            report.series[f"{operation} {form}"] = series
    report.notes.append(
        "us: of a call, on the slowest rank; GB/s: bytes that the busiest rank had to send, in "
        "that time; CPU us: mean of the ranks"
    )
    library.close()
    return report


def _compare(
    groups: Mapping[str, Collectives],
    operation: str,
    run: Operation,
    mesh: Mesh,
    size: int,
    repeats: int,
) -> list[Row]:
    """Time one operation in all forms; return a row of each."""
    per_row = _ROW_LEN * mesh.world.size * torch.float32.itemsize
    num_rows = mesh.world.size * max(mesh.world.size // 2 + 1, round(size / per_row))
    x = torch.ones(num_rows, _ROW_LEN, device=mesh.device)
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in groups}
    sent = {}
    num_calls = {}
    for form, group in groups.items():
        run(group, x)
        before = group.sent.total()
        seconds, _ = _time(partial(run, group, x), mesh, 1)
        sent[form] = group.sent.total() - before
        number = min(_MOST_CALLS, math.ceil(_LONGEST_SECONDS / seconds))
        # The ranks have measured different times.
        agreed = mesh.world.broadcast(torch.tensor([number], device=mesh.device))
        num_calls[form] = int(agreed.item())
    for _ in range(repeats):
        for form, group in groups.items():
            times[form].append(_time(partial(run, group, x), mesh, num_calls[form]))
    rows: list[Row] = []
    for form in groups:
        wall, cpu = (median(values) for values in zip(*times[form], strict=True))
        own = torch.tensor([wall, cpu, sent[form]], dtype=torch.float64, device=mesh.device)
        figures = mesh.world.all_gather(own)
        slowest, _, most_sent = figures.max(0).values.tolist()
        rows.append(
            {
                "operation": operation,
                "form": form,
                "bytes": x.nbytes,
                "us": 1e6 * slowest,
                "GB/s": most_sent / slowest / 1e9,
                "CPU us": 1e6 * float(figures[:, 1].mean()),
            }
        )
    return rows


def _time(run: Callable[[], object], mesh: Mesh, num_calls: int) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a call; all ranks start together."""
    mesh.world.all_gather(torch.zeros(1, device=mesh.device)).sum().item()
    cpu = time.process_time()
    begin = time.perf_counter()
    for _ in range(num_calls):
        run()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    end = time.perf_counter()
    return (end - begin) / num_calls, (time.process_time() - cpu) / num_calls
