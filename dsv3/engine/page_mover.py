"""Moves a rank's shard of pages between the tiers of the cache, as a plan tells."""

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.disk import GOOD, PENDING, DiskFiles
from dsv3.cache.host import HostPool
from dsv3.cache.tiers import Tiers
from dsv3.distributed.collectives import Collectives
from dsv3.engine.plan import Ints, StepPlan, unpack_pages


class PageMover:
    """Executes the part of a plan that concerns host memory and disk.

    Args:
        host: this rank's host memory.
        files: this rank's way to the disk; None where the plans never ask for it.
        ranks: all of them, over host memory.
        tiers: rank 0's books, told which pages have come from disk.
    """

    def __init__(
        self, host: HostPool, files: DiskFiles | None, ranks: Collectives, tiers: Tiers | None
    ) -> None:
        self.host, self._files, self._ranks, self._tiers = host, files, ranks, tiers

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
        if len(plan.confirm_fetched):
            milliseconds, *slots = plan.confirm_fetched.tolist()
            outcomes = self._agree(files, slots, milliseconds / 1000)
            if self._tiers is not None:
                self._tiers.confirm_fetched(outcomes)

    def _agree(self, files: DiskFiles, slots: list[int], seconds: float) -> dict[int, bool]:
        """Return the fetched slots that no rank is still reading, and whether all ranks could."""
        mine = torch.tensor(files.outcomes(slots, seconds))
        outcomes = self._ranks.all_gather(mine)
        is_done = (outcomes != PENDING).all(0).tolist()
        is_good = (outcomes == GOOD).all(0).tolist()
        settled = {}
        for slot, done, good in zip(slots, is_done, is_good, strict=True):
            if done:
                settled[slot] = good
                files.forget(slot)
        return settled


def _halves(pairs: Ints) -> tuple[Tensor, Tensor]:
    first, second = torch.from_numpy(pairs.astype(np.int64)).view(2, -1)
    return first, second
