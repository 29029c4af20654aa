"""Start-up decisions that need no checkpoint."""

import dataclasses

import pytest
import torch

from dsv3.config import ParallelConfig
from dsv3.engine import start
from dsv3.engine.config import EngineConfig
from dsv3.errors import ConfigError
from dsv3.parallel.collectives import SingleRank
from dsv3.parallel.experts import FP8
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.weights import WeightFormat
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


def test_what_tokens_travel_in() -> None:
    """FP8 where they are multiplied in it, or where the user says so."""
    wide, cpu = dataclasses.replace(TINY, hidden_size=256), torch.device("cpu")
    names = frozenset(["some"])
    for asked, products, travels in (
        ("auto", False, None),
        ("auto", True, FP8),
        ("bf16", True, torch.bfloat16),
        ("fp8", False, FP8),
    ):
        settings = EngineConfig(dispatch_dtype=asked, moe_dispatch="alltoall")
        fmt = WeightFormat(torch.bfloat16, cpu, names, products, products)
        chosen = start._dispatch(settings, wide, fmt)
        assert (chosen.form, chosen.dtype, chosen.ue8m0) == ("alltoall", travels, products)
        assert chosen.groups == (TINY.n_group, TINY.topk_group)
    ragged = WeightFormat(torch.bfloat16, cpu, names, True)
    assert start._dispatch(EngineConfig(), TINY, ragged).dtype is None
    with pytest.raises(
        ConfigError, match=r"--dispatch-dtype=fp8 .* hidden_size=320 is no multiple"
    ):
        start._dispatch(EngineConfig(dispatch_dtype="fp8"), TINY, ragged)
    with pytest.raises(ConfigError, match="--dispatch-dtype=int8 is unknown"):
        EngineConfig(dispatch_dtype="int8")
    with pytest.raises(ConfigError, match="--moe-dispatch=some is unknown"):
        EngineConfig(moe_dispatch="some")
