"""Start-up decisions that need no checkpoint."""

import dataclasses

import pytest
import torch

from dsv3.config import ParallelConfig
from dsv3.engine import start
from dsv3.parallel.collectives import SingleRank
from dsv3.parallel.mesh import Mesh
from tests.checkpoint_files import TINY


@pytest.mark.parametrize(
    ("hidden", "chosen", "threads"), [(256, None, 1), (2048, None, 4), (7168, None, 8), (256, 8, 8)]
)
def test_threads_that_a_model_keeps_busy(
    monkeypatch: pytest.MonkeyPatch, hidden: int, chosen: int | None, threads: int
) -> None:
    now = 8
    monkeypatch.setattr(torch, "get_num_threads", lambda: now)
    asked = [now]
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", str(chosen))
    one = SingleRank()
    mesh = Mesh(ParallelConfig(world_size=1, rank=0), torch.device("cpu"), one, one, one, 1)
    start._limit_threads(dataclasses.replace(TINY, hidden_size=hidden), mesh)
    assert asked[-1] == threads
