"""Marks that survive restarts of a job's ranks by torchrun.

torchrun's agent and its store outlive the ranks: a mark in the store is seen by all later attempts
of the same job, on any host, and by no other job.
"""

import os
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dsv3.distributed.launcher import is_restarted, rendezvous_address

_PREFIX = "dsv3/mark "
_ANSWER_SECONDS = 10.0


def has_mark(name: str) -> bool:
    """Return True if this job has set a mark, in this attempt or an earlier one.

    If the store does not outlive the ranks, the result is True in every attempt but the first.
    """
    with suppress(RuntimeError):
        store = _agent_store()
        if store is not None:
            return store.check([_PREFIX + name])
    return is_restarted()


def set_mark(name: str) -> None:
    """Set a mark. Does nothing without torchrun's store, because then there are no restarts."""
    with suppress(RuntimeError):
        store = _agent_store()
        if store is not None:
            store.set(_PREFIX + name, "1")


def _agent_store() -> dist.Store | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = rendezvous_address()
    return dist.TCPStore(
        address.host,
        address.port,
        world_size=None,
        is_master=False,
        timeout=timedelta(seconds=_ANSWER_SECONDS),
        wait_for_workers=False,
    )
