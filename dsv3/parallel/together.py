"""Fail together: when one rank cannot go on, every rank learns why and stops."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsv3.errors import Dsv3Error, RankError
from dsv3.parallel.mesh import Mesh

_MESSAGE_BYTES = 1024


@contextmanager
def fail_together(mesh: Mesh, stage: str) -> Iterator[None]:
    """Run a stage on all ranks; if it fails on any, raise that rank's error on every one.

    A collective at the end of the block: the block itself must not exchange anything, or a rank
    that fails would leave the others waiting inside it.

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
        code = error.exit_code if isinstance(error, Dsv3Error) else RankError.exit_code
        text = str(error) if isinstance(error, Dsv3Error) else f"{stage}: {error}"
        message = text.encode()[: _MESSAGE_BYTES - 1]
        mine[0] = code
        mine[1 : 1 + len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    told = mesh.world.all_gather(mine.to(mesh.device)).cpu()
    failed = told[:, 0].nonzero().flatten().tolist()
    if not failed:
        return
    first = failed[0]
    text = bytes(told[first, 1:].tolist()).rstrip(b"\0").decode(errors="replace")
    fault = Dsv3Error if int(told[first, 0]) == Dsv3Error.exit_code else RankError
    shared = fault(text if first == 0 else f"rank {first}: {text}")
    shared.told_elsewhere = mesh.layout.rank != 0
    raise shared from error
