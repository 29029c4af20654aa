"""Moves a rank's shard of pages between the tiers of the cache, as a plan tells."""

import numpy as np
import torch
from torch import Tensor

from dsv3.cache.host import HostPool
from dsv3.engine.plan import Ints, StepPlan


class Mover:
    """Executes the part of a plan that concerns host memory.

    Args:
        host: this rank's host memory.
    """

    def __init__(self, host: HostPool) -> None:
        self.host = host

    def before_copies(self, plan: StepPlan) -> None:
        """Save what the step is going to overwrite."""
        if len(plan.offload):
            self.host.offload(*_halves(plan.offload))

    def after_copies(self, plan: StepPlan) -> None:
        """Bring back what the step is going to read."""
        if len(plan.restore):
            self.host.restore(*_halves(plan.restore))


def _halves(pairs: Ints) -> tuple[Tensor, Tensor]:
    first, second = torch.from_numpy(pairs.astype(np.int64)).view(2, -1)
    return first, second
