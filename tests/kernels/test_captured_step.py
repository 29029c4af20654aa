"""The content of a CUDA graph: a decode step over the kernels, in which the host reads no value."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from benchlib import rank_share
from benchlib.rank_share import Rank, RankShape
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.stand_in import StandIn
from dsv3.engine.adjust import AdjustedRow, Adjuster, Adjustments, pack_adjustments
from dsv3.engine.cuda_graphs import GraphRunner
from dsv3.engine.runner import BatchBuilder, Runner
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_placement import Placement
from dsv3.parallel.storage import IntegerGroups
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.request import SamplingParams
from dsv3.settings import CacheDtype, DispatchVariant
from dsv3_kernels import operation
from dsv3_kernels.fp8_format import FP8

interpreter = pytest.importorskip("triton.runtime.interpreter")
CPU = torch.device("cpu")
LOOKS = ("item", "tolist", "cpu", "nonzero", "unique", "numpy", "__bool__", "__int__", "__float__")


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep weights as on a GPU: these models are made on a CPU, but kernels multiply by them."""
    monkeypatch.setattr(Transformer, "pack_weights", lambda self: None)


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Refuse calls that wait for the device, outside of the kernels themselves."""
    inside = [False]
    launch = interpreter.GridExecutor.__call__

    def launched(self: object, *args: object, **kwargs: object) -> None:
        inside[0] = True
        launch(self, *args, **kwargs)
        inside[0] = False

    def guard(method: Callable[..., object], by_mask: bool = False) -> Callable[..., object]:
        def look(self: Tensor, *args: object) -> object:
            masks = args[0] if by_mask and isinstance(args[0], tuple) else args[:1]
            is_look = not by_mask or any(
                isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks
            )
            assert inside[0] or not is_look, f"the host looks at values: {method.__name__}"
            return method(self, *args)

        return look

    guards = {name: guard(getattr(Tensor, name)) for name in LOOKS}
    guards |= {n: guard(getattr(Tensor, n), True) for n in ("__getitem__", "__setitem__")}
    with pytest.MonkeyPatch.context() as patch:
        for name, method in guards.items():
            patch.setattr(Tensor, name, method)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


def step(drawn: bool) -> StepPlan:
    plan = StepPlan.greedy(
        np.array([5, 9, 7], np.int32),
        np.array([3, 64, 9], np.int32),
        np.arange(1, 7, dtype=np.int32).reshape(3, 2),
    )
    if drawn:
        plan.temperature = np.array([0.5, 0.0, 1.0], np.float32)
        plan.top_p, plan.top_k = np.array([0.9, 1, 1], np.float32), np.array([0, 0, 5], np.int32)
    return plan


def check_no_host_reads(
    rank: Rank, plans_of: Callable[[bool], list[StepPlan]], monkeypatch: pytest.MonkeyPatch
) -> GraphRunner:
    """Run both kinds of step, then again over the kernels with host reads refused.

    The first plan is that of the rank's own group.
    """
    runner = Runner(rank.model, rank.cache, AbsorbRule(1), static=True)
    steps = runner._static
    assert steps is not None
    with torch.inference_mode():
        for drawn in (False, True):
            plans = plans_of(drawn)
            tables = BatchBuilder(plans[0], rank.cache.layout, CPU, AbsorbRule(1)).token_tables()
            bucket = steps.bucket(plans)
            assert bucket is not None and bucket.rows == 4
            steps.run(bucket, plans[0], tables)
        monkeypatch.setattr(operation, "use_triton", lambda x: True)
        for bucket, inputs in steps._inputs.items():
            with no_host_reads():
                steps._compute(bucket, inputs)
    assert {bucket.samples for bucket in steps._inputs} == {False, True}
    return steps


@pytest.mark.parametrize(
    ("weights", "cache"), [("fp8", "fp8"), ("bf16", "bf16"), ("int8", "bf16"), ("int4", "fp8")]
)
def test_a_decode_step_reads_no_values_on_the_host(
    weights: str, cache: CacheDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(load_model_config(DEMO), num_attention_heads=2, vocab_size=300)
    shape = RankShape(config=config, world=2, layers=2, weights=weights, cache=cache)
    rank = Rank(shape, CPU, 512)
    storages = [m for m in rank.model.modules() if isinstance(m, IntegerGroups)]
    assert (len(storages) >= 4) == weights.startswith("int")
    steps = check_no_host_reads(rank, lambda drawn: [step(drawn)], monkeypatch)
    with no_host_reads(), pytest.raises(AssertionError, match="looks at values: item"):
        steps._feed.sum().item()
    with no_host_reads(), pytest.raises(AssertionError, match="__getitem__"):
        steps._feed[steps._feed > 0]


def one_of_two_groups(
    form: DispatchVariant, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Rank:
    """Return one of four ranks on two hosts that are not there, with copies of experts."""
    layout = ParallelConfig(world_size=4, rank=1, tp=2, dp=2)
    pair, one = StandIn(1, 2), SingleRank()
    mesh = Mesh(
        layout,
        device,
        StandIn(1, 4),
        pair,
        one,
        2,
        dp=StandIn(0, 2),
        host=StandIn(1, 2),
        hosts=StandIn(0, 2),
    )
    config = replace(load_model_config(DEMO), num_attention_heads=2, vocab_size=300)
    placement = Placement.contiguous(replace(config, num_hidden_layers=2), 4, 4)
    settings = DispatchSettings(form, FP8)
    shape = RankShape(config=config, world=2, rank=1, layers=2)
    monkeypatch.setattr(rank_share, "ParallelConfig", lambda **_: layout)
    monkeypatch.setattr(rank_share, "stand_in_mesh", lambda *_: mesh)
    make = partial(Transformer, settings=settings, placement=placement)
    monkeypatch.setattr(rank_share, "Transformer", make)
    return Rank(shape, device, 512)


@pytest.mark.parametrize("form", ["allreduce", "alltoall"])
def test_a_step_of_several_groups_reads_no_values_on_the_host(
    form: DispatchVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank's own group is idle."""
    rank = one_of_two_groups(form, CPU, monkeypatch)
    check_no_host_reads(rank, lambda drawn: [StepPlan(), step(drawn)], monkeypatch)


def test_adjusting_logits_reads_no_values_on_the_host() -> None:
    """The token in flight is compared where it is."""
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 1.0})
    rows = [AdjustedRow(m, m - 1, Adjuster(params, [1, 2]), [1, 2, 5]) for m in range(3)]
    adjust = Adjustments.unpack(pack_adjustments(rows), torch.tensor([5, 6]))
    assert adjust is not None
    logits = torch.ones(3, 9)
    with no_host_reads():
        adjust.apply(logits)
    assert logits[:, 5].tolist() == pytest.approx([1 / 1.5 - 0.5, 1 / 1.5 - 1.0, 1 / 1.5 - 0.5])
    assert logits[:, 6].tolist() == pytest.approx([1.0, 1.0, 1 / 1.5 - 0.5])
