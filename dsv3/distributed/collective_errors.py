"""Errors across ranks: if a stage fails on one rank, all ranks raise its error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv3.distributed.mesh import Mesh
from dsv3.errors import (
    CheckpointError,
    ConfigError,
    Dsv3Error,
    OutputError,
    RankError,
    RequestError,
    describe_error,
)

_MESSAGE_BYTES = 1024
# For all ranks to reach the end of a stage in which one has failed.
_GRACE_SECONDS = 3.0
_KINDS = (RankError, ConfigError, CheckpointError, RequestError, OutputError)


@contextmanager
def collective_errors(mesh: Mesh, stage: str, is_fatal: bool = True) -> Iterator[None]:
    """Run a stage on all ranks; if it fails on any rank, raise that rank's error on all ranks.

    Rank 0's error is raised with its own type; an error of other ranks alone becomes a `RankError`.

    A collective at the end of the block: the block itself must not contain exchanges that a failing
    rank would leave the others waiting in.

    Args:
        mesh: the ranks.
        stage: name of the stage, for messages about errors from outside dsv3.
        is_fatal: a failure ends the job, even if another rank stays in the block for too long.
    """
    error: Exception | None = None
    try:
        yield
    except (Dsv3Error, OSError, RuntimeError, MemoryError) as caught:
        error = caught
    if mesh.world.size == 1:
        if error is not None:
            raise error
        return
    report = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    if error is not None:
        text = describe_error(error)
        if not isinstance(error, Dsv3Error):
            text = f"{stage}: {text}"
        if is_fatal:
            mesh.watchdog.warn(f"{mesh.watchdog.name_of(mesh.layout.rank)}: {text}", _GRACE_SECONDS)
        report = _encode(error, text)
    with mesh.watchdog.exchange():
        reports = mesh.world.all_gather(report.to(mesh.device)).cpu()
    failed = reports[:, 0].nonzero().flatten().tolist()
    if not failed:
        return
    first = failed[0]
    text = bytes(reports[first, 1:].tolist()).rstrip(b"\0").decode(errors="replace")
    shared: Dsv3Error = RankError(f"{mesh.watchdog.name_of(first)}: {text}")
    if first == 0:
        shared = _KINDS[int(reports[first, 0]) - 1](text)
    raise raised_everywhere(shared, mesh) from error


def raised_everywhere(error: Dsv3Error, mesh: Mesh) -> Dsv3Error:
    """Return an error that all ranks raise, marked so that rank 0 alone reports it."""
    error.seen_by_all_ranks = True
    error.reported_by_rank0 = mesh.layout.rank != 0
    return error


def _encode(error: Exception, text: str) -> Tensor:
    """Return [_MESSAGE_BYTES] uint8: 1 + the index of the error's type in `_KINDS`, then `text`."""
    kind = next((i for i, kind in enumerate(_KINDS) if isinstance(error, kind)), 0)
    message = text.encode(errors="replace")[: _MESSAGE_BYTES - 1]
    report = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    report[0] = 1 + kind
    report[1 : 1 + len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    return report
