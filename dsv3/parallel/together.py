"""Fail together: when one rank cannot go on, every rank learns why and stops."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsv3.errors import (
    CheckpointError,
    ConfigError,
    Dsv3Error,
    OutputError,
    RankError,
    RequestError,
)
from dsv3.parallel.mesh import Mesh

_MESSAGE_BYTES = 1024
_KINDS = (RankError, ConfigError, CheckpointError, RequestError, OutputError)


@contextmanager
def fail_together(mesh: Mesh, stage: str) -> Iterator[None]:
    """Run a stage on all ranks; if it fails on any, raise that rank's error on every one.

    A collective at the end of the block: a rank that fails must not leave the others waiting
    for it inside the block.

    Args:
        mesh: the ranks.
        stage: what the block does, for messages about errors that are not ours.
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
        text = str(error) if isinstance(error, Dsv3Error) else f"{stage}: {error}"
        message = text.encode(errors="replace")[: _MESSAGE_BYTES - 1]
        mine[0] = 1 + kind
        mine[1 : 1 + len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    told = mesh.world.all_gather(mine.to(mesh.device)).cpu()
    failed = told[:, 0].nonzero().flatten().tolist()
    if not failed:
        return
    first = failed[0]
    text = bytes(told[first, 1:].tolist()).rstrip(b"\0").decode(errors="replace")
    fault = _KINDS[int(told[first, 0]) - 1]
    shared = fault(text if first == 0 else f"rank {first}: {text}")
    shared.told_elsewhere = mesh.layout.rank != 0
    raise shared from error
