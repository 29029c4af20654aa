"""Checks on every rank: answers do not depend on the expert placement, also while experts move."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3.config import divisors
from dsv3.config_files import DEMO
from dsv3.distributed.mesh import Mesh
from dsv3.engine.engine import follow
from dsv3.engine.start import Started, start
from dsv3.model.moe import MoE
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch
from dsv3.parallel.expert_placement import Placement, read_layers
from dsv3.parallel.physical_experts import PhysicalExperts
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.request import Request, SamplingParams
from dsv3.settings import DispatchVariant, EngineConfig
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed.dispatch import VARIANTS, meshes
from tests.distributed.layers import CONFIG, FORMAT, filled
from tests.distributed.ranks import Check, alone

PROMPTS = [[7] * 20, [50, 60, 70], [900 + i for i in range(33)]]
TOKENS = 9
CACHE = EngineConfig(kv_cache_size="1024tok", max_seq_len=128)


def answers(mesh: Mesh, **settings: Any) -> tuple[list[list[int]], Started]:
    """Return greedy answers (on rank 0 only) and the engine that made them."""
    started = start(DEMO, replace(CACHE, **settings), mesh)
    found: dict[str, list[int]] = {}
    if started.engine is None:
        follow(started.runner, started.channel)
    else:
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            started.engine.add(Request(request_id=str(i), prompt_ids=prompt, params=params))
        while started.engine.has_work():
            for out in started.engine.step():
                if out.completion is not None:
                    found[out.request_id] = out.completion.token_ids
        started.engine.stop()
    started.runner.finish()
    return [found[key] for key in sorted(found)], started


def compare_answers(mesh: Mesh, folder: str) -> None:
    assert mesh.layout.tp == 2
    size = mesh.world.size
    load = f"{folder}/load.json"
    file = f"{folder}/placement.json"
    want, plain = answers(mesh)
    assert plain.runner.balancer is None and len(want) == (3 if mesh.world.rank == 0 else 0)
    num_copies = 0 if size == 2 else size
    weights = "auto" if size == 2 else "fp8"
    first = Placement.contiguous(plain.config, size, num_copies)

    def check(placed: Placement | None = None, **settings: Any) -> Started:
        if placed is not None:
            if mesh.world.rank == 0:
                placed.write(Path(file))
            mesh.world.all_reduce(torch.zeros(1))  # the others wait for the file
            settings["expert_placement"] = file
        got, started = answers(mesh, **settings)
        assert got == want, settings
        assert started.plan.weight_bytes == started.runner.weight_bytes, settings
        return started

    recorded = check(record_expert_load=load, redundant_experts=num_copies)
    assert recorded.runner.balancer is not None
    assert list(recorded.runner.balancer.placement.layers) == [1, 2, 3]
    check_loads(mesh, plain, load)
    mesh.world.all_reduce(torch.zeros(1))
    loads = read_layers(Path(load), ())[1]
    best = first.rebalanced(loads, plain.config.n_group, 1)
    assert best.imbalance(loads) < first.imbalance(loads)
    check(best, weights=weights)
    live = check(
        rebalance_every=3,
        record_expert_load=load,
        redundant_experts=num_copies,
        weights=weights,
    )
    check_loads(mesh, plain, load)
    assert live.runner.balancer is not None
    moved = live.runner.balancer.placement
    assert any((moved.layers[i] != first.layers[i]).any() for i in moved.layers)
    check_weights(live, check(moved, weights=weights))
    if not num_copies:  # the MTP layer's experts stay where they are, and have no copies
        check(moved, rebalance_every=2, record_expert_load=load, speculative_tokens=2)


def check_loads(mesh: Mesh, plain: Started, load: str) -> None:
    """The recorded loads count every token; the last token of an answer is never an input."""
    if mesh.world.rank == 0:
        (experts,), layers = read_layers(Path(load), ("num_experts",))
        fed = sum(len(prompt) for prompt in PROMPTS) + len(PROMPTS) * (TOKENS - 1)
        assert experts == 16 and list(layers) == [1, 2, 3]
        for counts in layers.values():
            assert counts.sum() == fed * plain.config.num_experts_per_tok


def check_weights(live: Started, fresh: Started) -> None:
    """Moved weights equal weights loaded for the same placement."""
    for live_layer, fresh_layer in zip(moe_layers(live), moe_layers(fresh), strict=True):
        local = list(range(live_layer.local.count))
        for name in ("gate_up_proj", "down_proj"):
            got = getattr(live_layer, name).take(local)
            want = getattr(fresh_layer, name).take(local)
            for got_bytes, want_bytes in zip(got, want, strict=True):
                assert_bitwise_equal(name, got_bytes, want_bytes)


def moe_layers(started: Started) -> list[MoE]:
    return [m for m in started.runner.model.modules() if isinstance(m, MoE)]


def check_layer(world: Mesh, tp: int, form: DispatchVariant) -> None:
    """One layer, tokens of several dp groups: copies are used in turn, every token is counted."""
    size = world.world.size
    start = Placement.contiguous(CONFIG, size, 2 * size)
    rng = np.random.default_rng(0)
    shuffled = Placement(12, size, {1: rng.permutation(start.layers[1])})
    with meshes(world, tp, size) as mesh:
        compare_layer(mesh, shuffled, form, tokens=11)


def compare_layer(mesh: Mesh, placement: Placement, form: DispatchVariant, tokens: int) -> None:
    prefix, settings = "model.layers.1.mlp.", DispatchSettings(variant=form)
    single = ExpertDispatch(alone(), CONFIG.n_routed_experts)
    side = SideStream(FORMAT.device)
    want = filled(MoE(CONFIG, prefix, alone().layout, FORMAT, single, side), alone())
    dispatch = ExpertDispatch(mesh, placement.num_physical, settings)
    physical = PhysicalExperts(placement, 1, mesh)
    dispatch.physical_experts[prefix] = physical
    layer = filled(MoE(CONFIG, prefix, mesh.layout, FORMAT, dispatch, side), mesh)
    assert layer.local.count == placement.physical_per_rank
    generator = torch.Generator().manual_seed(mesh.layout.dp_rank)
    x = torch.randn(tokens, CONFIG.hidden_size, generator=generator)
    name = f"{form} tp {mesh.layout.tp} dp {mesh.layout.dp}"
    assert_close(name, mesh.tp.all_reduce(layer(x)), want(x), 1e-5)
    ids = want.router(x)[0]
    chosen = physical(ids)
    assert (torch.from_numpy(placement.layers[1])[chosen] == ids).all()
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    assert physical.load_E.tolist() == (2 * ids.flatten().bincount(minlength=12)).tolist()
    padded = torch.where(torch.arange(tokens)[:, None] % 2 == 0, ids, -1)
    assert torch.equal(physical(padded), torch.where(padded < 0, -1, chosen))
    counted = 2 * ids.flatten().bincount(minlength=12) + ids[::2].flatten().bincount(minlength=12)
    assert physical.load_E.tolist() == counted.tolist()
    hot = torch.zeros(6, 1, dtype=torch.int64)
    used = physical(hot).flatten().bincount(minlength=placement.num_physical)
    copies = (placement.layers[1] == 0).sum()
    assert used.max() - used[used > 0].min() <= 1 and (used > 0).sum() == min(6, copies)


def check_engine(world: Mesh, folder: str) -> None:
    """The demo model with placements from a file and moved live; on four ranks with copies."""
    with meshes(world, 2, world.world.size) as mesh:  # four ranks are two groups
        compare_answers(mesh, folder)


def checks(size: int, folder: str) -> dict[str, Check]:
    """Return the checks of a world by name; files of placements go into `folder`."""
    found: dict[str, Check] = {"engine": partial(check_engine, folder=folder)}
    for tp in divisors(size):
        for variant in VARIANTS:
            found[f"layer tp {tp} {variant}"] = partial(check_layer, tp=tp, form=variant)
    return found
