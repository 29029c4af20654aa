"""Fail together: when one rank cannot go on, every rank learns why and stops."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
# For all ranks to come to the end of a stage in which one has failed.
_GRACE_SECONDS = 3.0
_KINDS = (RankError, ConfigError, CheckpointError, RequestError, OutputError)


@contextmanager
def fail_together(mesh: Mesh, stage: str, is_fatal: bool = True) -> Iterator[None]:
    """Run a stage on all ranks; if it fails on any, raise that rank's error on every one.

    What only another rank than 0 has met with is a `RankError`.

    A collective at the end of the block: a rank that fails must not leave the others waiting
    for it inside the block.

    Args:
        mesh: the ranks.
        stage: what the block does, for messages about errors that are not ours.
        is_fatal: a failure ends the job, even if another rank is too long within the block.
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
    mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    if error is not None:
        kind = next((i for i, kind in enumerate(_KINDS) if isinstance(error, kind)), 0)
        text = describe_error(error)
        if not isinstance(error, Dsv3Error):
            text = f"{stage}: {text}"
        if is_fatal:
            mesh.watch.warn(f"{mesh.watch.name_of(mesh.layout.rank)}: {text}", _GRACE_SECONDS)
        message = text.encode(errors="replace")[: _MESSAGE_BYTES - 1]
        mine[0] = 1 + kind
        mine[1 : 1 + len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    with mesh.watch.exchange():
        told = mesh.world.all_gather(mine.to(mesh.device)).cpu()
    failed = told[:, 0].nonzero().flatten().tolist()
    if not failed:
        return
    first = failed[0]
    text = bytes(told[first, 1:].tolist()).rstrip(b"\0").decode(errors="replace")
    shared: Dsv3Error = RankError(f"{mesh.watch.name_of(first)}: {text}")
    if first == 0:
        shared = _KINDS[int(told[first, 0]) - 1](text)
    shared.is_shared, shared.told_elsewhere = True, mesh.layout.rank != 0
    raise shared from error
