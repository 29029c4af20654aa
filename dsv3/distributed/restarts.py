"""The memory of a job over restarts of its ranks by torchrun.

torchrun's agent outlives the ranks, and so does its store: a mark left there is seen by every later
attempt of the same job, on whatever host rank 0 then is, and by no other job.
"""

import os
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dsv3.distributed.launcher import is_restarted, meeting_point

_PREFIX = "dsv3/mark "
_ANSWER_SECONDS = 10.0


def has_mark(name: str) -> bool:
    """Return True if this job has left a mark, in this attempt or an earlier one.

    Where the store does not outlive the ranks, every attempt but the first is taken to have one.
    """
    with suppress(RuntimeError):
        store = _agent_store()
        if store is not None:
            return store.check([_PREFIX + name])
    return is_restarted()


def set_mark(name: str) -> None:
    """Leave a mark. Without torchrun, or if its store is gone, there will be no other attempt."""
    with suppress(RuntimeError):
        store = _agent_store()
        if store is not None:
            store.set(_PREFIX + name, "1")


def _agent_store() -> dist.Store | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place, seconds = meeting_point(), timedelta(seconds=_ANSWER_SECONDS)
    return dist.TCPStore(place.host, place.port, None, False, seconds, wait_for_workers=False)
