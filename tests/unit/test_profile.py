"""Measured times add up to the step, and are matched with floors of the same operations."""

import time

import pytest
import torch
from torch import Tensor, nn

from benchlib.bound import Profile, assign_ops, share_of_roof
from benchlib.hardware import HARDWARE, hardware
from benchlib.operation import Op
from benchlib.profiler import Profiler
from benchlib.step_shape import StepShape
from dsv3.config_files import DEMO
from dsv3.distributed.collectives import SingleRank
from dsv3.engine.start import start
from dsv3.errors import ConfigError
from dsv3.request import Request, SamplingParams
from dsv3.settings import EngineConfig
from tests.distributed.ranks import CPU, alone

SLOW, FAST = 2.0, 0.5


class Hands:
    """A clock that is advanced by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += seconds


class Slow(nn.Module):
    """Takes its time before its child does, and for an exchange."""

    def __init__(self, hands: Hands, child: nn.Module | None = None) -> None:
        super().__init__()
        self.tp = SingleRank()
        self.hands = hands
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        self.hands.go(SLOW)
        return self.tp.all_reduce(x if self.child is None else self.child(x))


def test_spans_hold_their_own_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    monkeypatch.setattr("benchlib.profiler.time", hands)
    profiler, model = Profiler(CPU), Slow(hands, Slow(hands))
    profiler.attach(model)
    after = profiler.wrap("after", lambda: hands.go(FAST))
    for _ in range(2):
        with profiler.step(StepShape(decode=1)):
            model(torch.zeros(1))
            after()
            hands.go(1.0)
    found = {name: (each.seconds, each.count) for name, each in profiler.measured.items()}
    assert found == {
        "step": (2.0, 2),
        "model": (2 * SLOW, 2),
        "child": (2 * SLOW, 2),
        "model.all_reduce": (0.0, 2),
        "child.all_reduce": (0.0, 2),
        "after": (2 * FAST, 2),
    }
    assert profiler.steps == 2 and profiler.step_seconds == 2 * (2 * SLOW + FAST + 1.0)
    assert profiler.shapes == {StepShape(decode=1): 2}
    profiler.detach()
    model(torch.zeros(1))
    assert isinstance(model.tp, SingleRank) and profiler.measured["model"].count == 2


def test_floors_go_to_the_longest_name() -> None:
    names = ["self_attn.o_proj", "self_attn.mla_decode", "moe.shared_experts.down_proj", "norm"]
    ops = [Op(name, bytes=3.211e9) for name in names]
    found = assign_ops({"self_attn", "self_attn.o_proj", "moe", "step"}, [(ops, 3), (ops[:1], 1)])
    assert found == {
        "self_attn.o_proj": [(ops[0], 3), (ops[0], 1)],
        "self_attn": [(ops[1], 3)],
        "moe": [(ops[2], 3)],
        "step": [(ops[3], 3)],
    }


def test_the_demo_models_step_is_accounted_for() -> None:
    started = start(DEMO, EngineConfig(kv_cache_size="4096tok"), alone())
    engine = started.engine
    assert engine is not None
    profile = Profile("measure", started)
    for i in range(4):
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        engine.add(Request(request_id=str(i), prompt_ids=[1, 2, 3 + i] * 20, params=params))
    begin, before = time.perf_counter(), engine.metrics.run_seconds
    while engine.has_work():
        engine.step()
    seconds = time.perf_counter() - begin
    ran = engine.metrics.run_seconds - before
    report = profile.report(ran)
    rows = {row["operation"]: row for row in report.rows}
    total = report.setting["steps"] * sum(row["ms"] for row in report.rows) / 1e3
    assert total == pytest.approx(seconds, rel=0.05)
    assert sum(row["share %"] for row in report.rows) == pytest.approx(100)
    for name in ("self_attn", "self_attn.in_proj", "self_attn.o_proj", "moe", "lm_head", "host"):
        assert rows[name]["ms"] > 0
    layers = started.config.num_hidden_layers
    assert rows["self_attn"]["calls"] == layers and rows["moe.router"]["calls"] <= layers
    # Small weights come out of the processor's cache, so single floors may be undercut.
    assert sum(row["floor ms"] for row in report.rows) < sum(row["ms"] for row in report.rows)
    assert {"self_attn", "moe", "lm_head"} <= {n for n, row in rows.items() if row["floor ms"]}
    assert report.notes[0].startswith("operations add up to ")


def test_hardware() -> None:
    assert hardware("h200", CPU) is HARDWARE["h200"]
    with pytest.raises(ConfigError, match="--hardware=b200 is unknown; use measure, h100"):
        hardware("b200", CPU)


def test_operations_in_a_cache_can_beat_the_memory_roof() -> None:
    assert share_of_roof(1.0, 2.0) == 50.0
    assert share_of_roof(2.0, 1.0) == "in cache"
