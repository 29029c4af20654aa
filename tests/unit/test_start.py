"""Start-up decisions that need no checkpoint."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch

from dsv3.cache.layout import CacheLayout
from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.engine import measured_memory, setup
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weight_format import WeightFormat
from dsv3.settings import EngineConfig
from dsv3_kernels.fp8_format import FP8
from tests.checkpoint_files import TINY


def test_dtype_of_dispatched_tokens() -> None:
    """FP8 where they are multiplied in it by experts stored in it, or where the user says so."""
    wide, cpu = replace(TINY, hidden_size=256), torch.device("cpu")
    names = frozenset(["some"])
    cases: list[tuple[Literal["auto", "bf16", "fp8"], bool, bool, torch.dtype | None]] = [
        ("auto", False, True, None),
        ("auto", True, True, FP8),
        ("auto", True, False, None),
        ("bf16", True, True, torch.bfloat16),
        ("fp8", False, False, FP8),
    ]
    for asked, products, fp8_experts, travels in cases:
        settings = EngineConfig(dispatch_dtype=asked, moe_dispatch="alltoall")
        fmt = WeightFormat(torch.bfloat16, cpu, names, products, products)
        chosen = setup.dispatch_settings(settings, wide, fmt, fp8_experts)
        assert (chosen.variant, chosen.dtype, chosen.ue8m0) == ("alltoall", travels, products)
        assert chosen.groups == (TINY.n_group, TINY.topk_group)
    ragged = WeightFormat(torch.bfloat16, cpu, names, True)
    assert setup.dispatch_settings(EngineConfig(), TINY, ragged, True).dtype is None
    with pytest.raises(
        ConfigError, match=r"dispatch_dtype=fp8 .* hidden_size=320 is not a multiple"
    ):
        setup.dispatch_settings(EngineConfig(dispatch_dtype="fp8"), TINY, ragged, True)
    with pytest.raises(ConfigError, match="dispatch_dtype=int8 is unknown"):
        EngineConfig(**cast(dict[str, Any], {"dispatch_dtype": "int8"}))
    with pytest.raises(ConfigError, match="moe_dispatch=some is unknown"):
        EngineConfig(**cast(dict[str, Any], {"moe_dispatch": "some"}))


class Gpu:
    """The memory of a pretended device: every step takes some, graphs keep theirs."""

    def __init__(self) -> None:
        self.allocated = 1000
        self.reserved = 5000
        self.peak = 0
        self.kept = 0
        self.steps: list[StepPlan] = []

    def runner(self, *_: object, static: bool, drafts: bool) -> Any:
        def run(plans: list[StepPlan]) -> None:
            self.steps += plans[:1]
            is_decode = len(plans[0].row) == len(plans[0].query_len)
            if static and is_decode:
                self.kept += 300
            self.reserved += 70_000
            self.peak = max(self.peak, self.allocated + (60_000 if not is_decode else 20_000))

        return SimpleNamespace(run=run)

    def empty_cache(self) -> None:
        self.reserved = 5000 + self.kept


@pytest.mark.parametrize("static", [False, True])
def test_the_cache_leaves_what_the_largest_steps_take(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured memory is that of the fullest step and of CUDA graphs, if there are any."""
    gpu = Gpu()
    one = SingleRank()
    device = torch.device("cuda")
    for name, value in (
        ("memory_allocated", lambda _: gpu.allocated),
        ("max_memory_allocated", lambda _: gpu.peak),
        ("memory_reserved", lambda _: gpu.reserved),
        ("reset_peak_memory_stats", lambda _: None),
        ("empty_cache", gpu.empty_cache),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measured_memory, "CachePool", lambda *_: None)
    monkeypatch.setattr(measured_memory, "Runner", gpu.runner)
    monkeypatch.setattr(measured_memory, "free_memory", lambda *_: 50_000_000)
    settings = EngineConfig(max_running=1000, max_batch_tokens=1200)
    layout = CacheLayout.make(TINY, "latent", "none", "fp32", 1, 0)
    fmt = WeightFormat(torch.float32, torch.device("cpu"))
    made = setup.Setup(TINY, settings, fmt, layout, 512, None, DispatchSettings(), 10**6)
    mesh = Mesh(ParallelConfig(), device, one, one, one, 1)
    plan = made.plan_memory(replace(mesh, device=torch.device("cpu")), 60_000_000)
    model: Any = SimpleNamespace(config=TINY)
    measured = measured_memory.measured_plan(plan, made, mesh, model, static)
    assert measured.activation_bytes == 60_000 + 300 * static
    assert f"steps {measured.activation_bytes / 1024:.4g} KiB" in measured.describe()
    full, *decode = gpu.steps
    assert full.query_len.tolist() == [1] * 1000 + [200] and full.context_len.max() == 511
    assert [len(step.row) for step in decode] == [256] * static
    fixed = replace(made, settings=replace(settings, kv_cache_size="640tok"))
    assert measured_memory.measured_plan(plan, fixed, mesh, model, static) is plan
