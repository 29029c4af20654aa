"""Compiling of kernels at start-up, in parallel processes, so that no step waits for a compiler."""

import hashlib
import json
import logging
import os
import sys
import threading
from dataclasses import astuple

import torch
from tqdm import tqdm

from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.mesh import Mesh
from dsv3.engine.kernel_variants import list_variants
from dsv3.engine.setup import Setup
from dsv3_kernels._gpu import Gpu, gpu_of
from dsv3_kernels.variants import CACHED, COMPILED, Variant, compile_variants

log = logging.getLogger(__name__)


def compile_ahead(setup: Setup, mesh: Mesh) -> None:
    """Compile all kernels that steps can ask for and that Triton's cache does not have.

    The ranks of a host share the work. A kernel that fails here is compiled at its first use.
    A collective.
    """
    wish = setup.settings.compile_ahead
    gpu = gpu_of(mesh.device)
    if gpu is None and wish == "on" and mesh.layout.rank == 0:
        log.info("no kernels to compile: this device runs without them")
    if gpu is None or wish == "off":
        return
    with collective_errors(mesh, "compiling kernels"):
        variants = _listed(setup, mesh, gpu)
    with mesh.watchdog.exchange():
        mine = _share(variants, mesh)
    progress = Progress(len(mine), mesh)
    with (
        collective_errors(mesh, "compiling kernels"),
        mesh.watchdog.counting(lambda: progress.num_done),
        progress,
    ):
        overlap = setup.settings.overlap_launches
        compile_variants(mine, gpu, overlap, _cores(mesh), progress.done)


def _listed(setup: Setup, mesh: Mesh, gpu: Gpu) -> list[Variant]:
    """Return the variants; none, with a warning, if they cannot be listed."""
    try:
        return list_variants(setup, mesh, gpu)
    except Exception as error:  # of any kind: the model runs without the list
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        log.warning("kernels are compiled when they are first used: %s", text)
        log.debug("kernels could not be listed", exc_info=True)
        return []


def _share(variants: list[Variant], mesh: Mesh) -> list[Variant]:
    """Return the variants that this rank compiles.

    The ranks of a host that have the same list share it. A collective.
    """
    text = json.dumps([astuple(variant) for variant in variants])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    digests = mesh.world.all_gather(torch.tensor([digest], device=mesh.device)).flatten().tolist()
    wants = list(zip(mesh.host_of_rank, digests, strict=True))
    rank = mesh.layout.rank
    sharing = [other for other, want in enumerate(wants) if want == wants[rank]]
    return variants[sharing.index(rank) :: len(sharing)]


def _cores(mesh: Mesh) -> int:
    """Return this rank's share of the host's cores."""
    return max(1, len(os.sched_getaffinity(0)) // mesh.ranks_on_host)


class Progress:
    """Counts variants; shows rank 0's on a terminal, and logs a line at the end.

    Attributes:
        num_done: variants that are in the cache, or failed.
        num_compiled: variants that were not in the cache.
    """

    def __init__(self, total: int, mesh: Mesh) -> None:
        self.num_done = self.num_compiled = 0
        self._failed: list[str] = []
        self._is_first = mesh.layout.rank == 0
        self._lock = threading.Lock()
        hidden = not (self._is_first and sys.stderr.isatty())
        self._bar = tqdm(total=total, desc="kernels", unit="", disable=hidden, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        if self._failed and kind is None:  # an interrupt also ends the compiling processes
            others = len(self._failed) - 1
            more = f" (and {others} more; debug logging names them)" if others else ""
            log.warning("compiled when it is first used: %s%s", self._failed[0], more)
            for text in self._failed[1:]:
                log.debug("compiled when it is first used: %s", text)
        if self._is_first and self.num_compiled:  # of this rank's share
            log.info("compiled %d of %d kernels", self.num_compiled, self.num_done)

    def done(self, variant: Variant, reply: str) -> None:
        """Count a variant; called by several threads."""
        with self._lock:
            self.num_done += 1
            self.num_compiled += reply == COMPILED
            if reply not in (COMPILED, CACHED):
                self._failed.append(f"{variant.describe()}: {reply}")
            self._bar.update()
