"""Compares digests of plans and sampled tokens over ranks, to find a rank that is wrong."""

import zlib
from dataclasses import fields

import torch
from torch import Tensor

from dsv3.distributed.mesh import Mesh
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import RankError


class DivergenceCheck:
    """One rank's digests over all of its steps; every `every`-th waits for the device."""

    def __init__(self, mesh: Mesh, every: int) -> None:
        self._mesh = mesh
        self._every = every
        self._num_steps = self._plan_digest = 0
        self._token_digest = torch.zeros((), dtype=torch.int64, device=mesh.device)

    def add(self, plans: list[StepPlan], token_M: Tensor) -> None:
        """Add a step of all groups to the digests, which depend on the order of steps and tokens.

        Raises:
            RankError: the ranks have not all done the same. A collective at every `every`-th step.
        """
        for plan in plans:
            for f in fields(plan):
                self._plan_digest = zlib.crc32(getattr(plan, f.name), self._plan_digest)
        place_M = torch.arange(1, 1 + len(token_M), device=token_M.device)
        self._token_digest.mul_(31).add_((token_M * place_M).sum())
        self._num_steps += 1
        if self._num_steps % self._every == 0:
            self._compare(torch.tensor([self._plan_digest, int(self._token_digest)]))

    def _compare(self, mine: Tensor) -> None:
        reported = [tuple(row) for row in self._mesh.control.all_gather(mine).tolist()]
        usual = max(reported, key=reported.count)
        odd = [rank for rank, digests in enumerate(reported) if digests != usual]
        if not odd:
            return
        is_plan = reported[odd[0]][0] != usual[0]
        difference = "run other plans" if is_plan else "sampled other tokens"
        names = self._mesh.watchdog.name_of(*odd)
        raise RankError(
            f"{names} has {difference} than the other ranks in one of the "
            f"last {self._every} steps: their answers cannot be trusted; look for a faulty "
            "device or memory"
        )
