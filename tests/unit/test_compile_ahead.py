"""Kernels compiled at start-up: the part of the engine. `tests/kernels` compiles some."""

import logging
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from dsv3.config import ParallelConfig
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine import compile_ahead as ahead
from dsv3.settings import EngineConfig
from dsv3_kernels._gpu import Gpu
from dsv3_kernels.variants import CACHED, COMPILED, Variant, compile_variants

MESH = stand_in_mesh(ParallelConfig(world_size=1), torch.device("cpu"))
VARIANTS = [Variant("some.module", f"_kernel_{i}", '{"constant_vals": [16]}') for i in range(5)]


def setup(wish: Literal["auto", "on", "off"]) -> Any:
    return SimpleNamespace(settings=EngineConfig(compile_ahead=wish))


@pytest.mark.parametrize(("wish", "lines"), [("on", 1), ("auto", 0), ("off", 0)])
def test_a_cpu_has_nothing_to_compile(
    wish: Literal["auto", "on", "off"], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ahead.compile_ahead(setup(wish), MESH)
    assert caplog.messages == lines * ["no kernels to compile: this device runs without them"]


def pretend(monkeypatch: pytest.MonkeyPatch, replies: dict[Variant, str]) -> list[Variant]:
    """Let this process find a GPU, and compilers that give these replies; return their work."""
    asked: list[Variant] = []

    def compile_variants(variants: list[Variant], *rest: Any) -> None:
        asked.extend(variants)
        for variant in variants:
            rest[-1](variant, replies.get(variant, CACHED))

    monkeypatch.setattr(ahead, "gpu_of", lambda _: Gpu((9, 0), 132, 228 << 10))
    monkeypatch.setattr(ahead, "list_variants", lambda *_: VARIANTS)
    monkeypatch.setattr(ahead, "compile_variants", compile_variants)
    return asked


def test_a_second_start_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    replies = dict.fromkeys(VARIANTS[:3], COMPILED) | {VARIANTS[3]: "PTXASError: no memory"}
    asked = pretend(monkeypatch, replies)
    ahead.compile_ahead(setup("auto"), MESH)
    assert asked == VARIANTS
    failed = "compiled when it is first used: _kernel_3 [16]: PTXASError: no memory"
    assert caplog.messages == [failed, "compiled 3 of 5 kernels"]
    caplog.clear()
    pretend(monkeypatch, {})
    ahead.compile_ahead(setup("on"), MESH)
    assert not caplog.messages
    ahead.compile_ahead(setup("off"), MESH)


def test_many_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pretend(monkeypatch, dict.fromkeys(VARIANTS, "PermissionError: /cache"))
    ahead.compile_ahead(setup("on"), MESH)
    (line,) = caplog.messages
    assert "_kernel_0 [16]: PermissionError: /cache (and 4 more;" in line


def test_an_interrupt_is_no_failure_of_kernels(caplog: pytest.LogCaptureFixture) -> None:
    def interrupted() -> None:
        with ahead.Progress(5, MESH) as progress:
            progress.done(VARIANTS[0], "the compiling process ended with -2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not caplog.messages


# Processes that compile two variants, then die; that die at once; that cannot start.
DYING = {
    "later": (["bash", "-c", "for _ in 1 2; do read x; echo compiled; done; read x; exit 3"], 4),
    "at once": (["bash", "-c", "exit 3"], 0),
    "no start": (["/no/such/python"], 0),
}


@pytest.mark.parametrize("case", DYING)
def test_processes_that_die_cost_their_variants(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, num_compiled = DYING[case]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: popen(command, **more))
    replies: dict[Variant, str] = {}
    compile_variants(VARIANTS, Gpu((9, 0), 132, 228 << 10), False, 1, replies.__setitem__)
    failed = [text for text in replies.values() if text != COMPILED]
    assert len(replies) == 5 and len(failed) == 5 - num_compiled
    reason = "no process for compiling starts: " if case == "no start" else "ended with 3"
    assert all(reason in text for text in failed), failed


def test_ranks_of_a_host_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(2):
        mesh = stand_in_mesh(ParallelConfig(world_size=2, rank=rank), torch.device("cpu"))
        mesh = replace(mesh, host_of_rank=(0, 0))
        parts.append(ahead._share(VARIANTS, mesh))
    assert sorted(parts[0] + parts[1]) == VARIANTS and len(parts[0]) == 3
    elsewhere = replace(mesh, host_of_rank=(0, 1))
    assert ahead._share(VARIANTS, elsewhere) == VARIANTS, "each host has a cache of its own"
    gather = mesh.world.all_gather
    others = torch.tensor([[1], [0]])  # rank 0 has another list
    monkeypatch.setattr(mesh.world, "all_gather", lambda x: gather(x) + others)
    assert ahead._share(VARIANTS, mesh) == VARIANTS, "lists that differ are not shared"


def test_a_model_runs_without_a_list(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = pretend(monkeypatch, {})
    monkeypatch.setattr(ahead, "list_variants", lambda *_: 1 // 0)
    ahead.compile_ahead(setup("auto"), MESH)
    assert not asked and len(caplog.messages) == 1
    assert "when they are first used: ZeroDivisionError" in caplog.messages[0]
