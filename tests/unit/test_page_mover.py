"""Ranks agree on the pages fetched, although reads end at different times or fail on some."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.cache.disk import BAD, GOOD, PENDING, DiskFiles
from dsv3.cache.host import HostPool
from dsv3.distributed.collectives import SingleRank
from dsv3.engine.page_mover import PageMover
from dsv3.engine.step_plan import StepPlan


class Files:
    """This rank's reads."""

    def __init__(self, outcomes: dict[int, int]) -> None:
        self.reads, self.waited = outcomes, -1.0

    def outcomes(self, host_pages: list[int], seconds: float) -> list[int]:
        self.waited = seconds
        return [self.reads[host_page] for host_page in host_pages]

    def forget(self, host_page: int) -> None:
        del self.reads[host_page]


class Peers(SingleRank):
    """The other ranks' reads."""

    def __init__(self, others: list[list[int]]) -> None:
        self.others = others

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, *map(torch.tensor, self.others)])


@pytest.mark.parametrize(
    ("mine", "theirs", "is_good"),
    [
        (GOOD, GOOD, True),
        (GOOD, BAD, False),
        (BAD, GOOD, False),
        # A rank that is still reading will write to the page, whatever the other ranks' results.
        (GOOD, PENDING, None),
        (BAD, PENDING, None),
        (PENDING, BAD, None),
    ],
)
def test_a_read_is_finished_when_no_rank_reads_the_slot(
    mine: int, theirs: int, is_good: bool | None
) -> None:
    files = Files({7: mine, 3: GOOD})
    mover = PageMover(
        cast(HostPool, None), cast(DiskFiles, files), Peers([[theirs, GOOD], [GOOD, GOOD]])
    )
    fetched = mover.before_copies(StepPlan(confirm_fetched=np.array([20, 7, 3], np.int32)))
    assert fetched == {3: True} | ({} if is_good is None else {7: is_good})
    assert files.reads == ({7: mine} if is_good is None else {})
    assert files.waited == 0.02
