"""Threads of a program, and the process of a script that uses the library."""

import gc
import os
from dataclasses import replace

import pytest
import torch

from common import limit_threads, share_of_cores
from dsv3 import LLM
from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from tests.checkpoint_files import TINY


def test_threads_are_the_users_setting_or_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert share_of_cores(4) == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert share_of_cores(4) == 3
    assert share_of_cores(24) == 1


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
    limit_threads(replace(TINY, hidden_size=hidden), mesh)
    assert asked[-1] == threads


def test_the_library_leaves_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as under torchrun")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads(), dict(os.environ)
    num_frozen = gc.get_freeze_count()
    with LLM(max_seq_len=512) as llm:
        llm.generate("Hi", {"max_tokens": 2})
        assert (torch.get_num_threads(), dict(os.environ)) == before
        assert gc.get_freeze_count() <= num_frozen  # what earlier tests have frozen may be freed
