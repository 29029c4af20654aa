"""Moves a rank's shard of pages between the tiers of the cache, as a plan tells."""

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.disk import GOOD, PENDING, DiskFiles
from dsv3.cache.host import HostPool
from dsv3.engine.plan import Ints, StepPlan, unpack_pages
from dsv3.parallel.collectives import Collectives


class Mover:
    """Executes the part of a plan that concerns host memory and disk.

    Args:
        host: this rank's host memory.
        files: this rank's way to the disk; None where the plans never ask for it.
        ranks: those that hold parts of the same pages.

    Attributes:
        settled: fetched slots on which the ranks have agreed in the last plan, and whether all of
            them could read their part.
    """

    def __init__(self, host: HostPool, files: DiskFiles | None, ranks: Collectives) -> None:
        self.host, self._files, self._ranks = host, files, ranks
        self.settled: dict[int, bool] = {}

    def before_copies(self, plan: StepPlan) -> None:
        """Save what the step is going to overwrite."""
        if self._files is not None:
            self._use_disk(self._files, plan)
        if len(plan.offload):
            self.host.offload(*_halves(plan.offload))

    def after_copies(self, plan: StepPlan) -> None:
        """Bring back what the step is going to read."""
        if len(plan.restore):
            self.host.restore(*_halves(plan.restore))

    def _use_disk(self, files: DiskFiles, plan: StepPlan) -> None:
        if len(plan.store) or len(plan.fetch):
            self.host.synchronize()
        for slot, key in unpack_pages(plan.store):
            files.store(slot, key)
        for slot, key in unpack_pages(plan.fetch):
            files.fetch(slot, key)
        self.settled = {}
        if len(plan.settle):
            milliseconds, *slots = plan.settle.tolist()
            self._agree(files, slots, milliseconds / 1000)

    def _agree(self, files: DiskFiles, slots: list[int], seconds: float) -> None:
        """Tell the other ranks what came from disk. A slot is settled when no rank still reads."""
        mine = torch.tensor(files.outcomes(slots, seconds), device=self.host.device)
        outcomes = self._ranks.all_gather(mine).cpu()
        is_done, is_good = (outcomes != PENDING).all(0).tolist(), (outcomes == GOOD).all(0).tolist()
        for slot, done, good in zip(slots, is_done, is_good, strict=True):
            if done:
                self.settled[slot] = good
                files.forget(slot)


def _halves(pairs: Ints) -> tuple[Tensor, Tensor]:
    first, second = torch.from_numpy(pairs.astype(np.int64)).view(2, -1)
    return first, second
