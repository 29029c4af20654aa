"""Moves a rank's shard of pages between the tiers of the cache, as the step plan says."""

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.disk import GOOD, PENDING, DiskFiles
from dsv3.cache.host import HostPool
from dsv3.distributed.collectives import Collectives
from dsv3.engine.step_plan import Ints, StepPlan, unpack_pages


class PageMover:
    """Executes the part of a plan that concerns host memory and disk.

    Args:
        host: this rank's host memory.
        files: this rank's access to the disk; None if there is no disk cache.
        ranks: all ranks, over host memory.
    """

    def __init__(self, host: HostPool, files: DiskFiles | None, ranks: Collectives) -> None:
        self.host = host
        self._files = files
        self._ranks = ranks

    def before_copies(self, plan: StepPlan) -> dict[int, bool]:
        """Save the pages that the step is going to overwrite.

        Returns:
            see `StepResult.fetched`.
        """
        fetched = {} if self._files is None else self._use_disk(self._files, plan)
        if len(plan.offload):
            self.host.offload(*_halves(plan.offload))
        return fetched

    def after_copies(self, plan: StepPlan) -> None:
        """Bring back the pages that the step is going to read."""
        if len(plan.restore):
            self.host.restore(*_halves(plan.restore))

    def _use_disk(self, files: DiskFiles, plan: StepPlan) -> dict[int, bool]:
        if len(plan.store) or len(plan.fetch):
            self.host.synchronize()
        for page, key in unpack_pages(plan.store):
            files.store(page, key)
        for page, key in unpack_pages(plan.fetch):
            files.fetch(page, key)
        if not len(plan.confirm_fetched):
            return {}
        milliseconds, *pages = plan.confirm_fetched.tolist()
        return self._agree(files, pages, milliseconds / 1000)

    def _agree(self, files: DiskFiles, pages: list[int], seconds: float) -> dict[int, bool]:
        """Return the pages that no rank is still reading: True if all ranks could read theirs."""
        mine = torch.tensor(files.outcomes(pages, seconds))
        outcomes = self._ranks.all_gather(mine)
        is_done = (outcomes != PENDING).all(0).tolist()
        is_good = (outcomes == GOOD).all(0).tolist()
        fetched = {}
        for page, done, good in zip(pages, is_done, is_good, strict=True):
            if done:
                fetched[page] = good
                files.forget(page)
        return fetched


def _halves(pairs: Ints) -> tuple[Tensor, Tensor]:
    first, second = torch.from_numpy(pairs.astype(np.int64)).view(2, -1)
    return first, second
