"""Expert placement: the published balancer, copies, few moves, files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dsv3.config import ParallelConfig
from dsv3.engine.balance import place_experts
from dsv3.errors import ConfigError, OutputError
from dsv3.parallel.expert_placement import (
    Placement,
    balanced_experts,
    keep_in_place,
    pack_balanced,
    read_layers,
    replicate,
    write_layers,
)
from dsv3.settings import EngineConfig
from tests.checkpoint_files import TINY

SIXTEEN = dataclasses.replace(TINY, n_routed_experts=16, n_group=4, num_hidden_layers=4)


def test_the_published_example() -> None:
    """Two layers of 12 experts in 4 groups, 16 physical experts, 2 nodes, 8 ranks."""
    examples = {
        "90 132 40 61 104 165 39 4 73 56 183 86": "5 6 5 7 8 4 3 4 10 9 10 2 0 1 11 1",
        "20 107 104 64 19 197 187 157 172 86 16 27": "7 10 6 8 6 11 8 9 2 4 5 1 5 0 3 1",
    }
    for load, wanted in examples.items():
        physical = balanced_experts([float(n) for n in load.split()], 16, 4, 2, 8)
        assert physical.tolist() == [int(n) for n in wanted.split()]


def test_packs_are_equal_in_number_and_close_in_load() -> None:
    assert pack_balanced(np.array([5.0, 1, 4, 2]), 2).tolist() == [[0, 1], [2, 3]]
    assert pack_balanced(np.array([1.0, 9, 2]), 3).tolist() == [[0], [1], [2]]
    assert pack_balanced(np.zeros(4), 2).tolist() == [[0, 1], [2, 3]]


def test_the_most_loaded_expert_is_copied_first() -> None:
    assert replicate(np.array([1.0, 9, 3]), 7).tolist() == [0, 1, 2, 1, 1, 1, 2]
    assert replicate(np.zeros(2), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("experts", "physical", "groups", "nodes", "ranks"),
    [
        (16, 16, 4, 2, 4),
        (16, 16, 4, 3, 4),
        (16, 24, 4, 1, 8),
        (12, 18, 3, 2, 6),
        (256, 288, 8, 4, 32),
        (8, 8, 1, 1, 8),
    ],
)
def test_random_loads(experts: int, physical: int, groups: int, nodes: int, ranks: int) -> None:
    """Every expert has a place, nodes keep whole groups, and no balance gets worse."""
    config = dataclasses.replace(TINY, n_routed_experts=experts, n_group=groups)
    start = Placement.contiguous(config, ranks, physical - experts)
    rng = np.random.default_rng(experts + physical)
    for skew in (0.0, 1.0, 3.0):
        load = (1000 * rng.random(experts) ** (1 + skew)).astype(np.int64)
        layer = balanced_experts(load, physical, groups, nodes, ranks)
        assert layer.tolist() == balanced_experts(load, physical, groups, nodes, ranks).tolist()
        assert set(layer.tolist()) == set(range(experts)) and len(layer) == physical
        if groups % nodes == 0:
            group = layer.reshape(nodes, -1) // (experts // groups)
            assert sum(len(set(row)) for row in group.tolist()) == groups
        end = start.rebalanced({1: load}, groups, nodes)
        assert end.imbalance({1: load}) <= start.imbalance({1: load})
        assert start.rank_loads(1, load).sum() == pytest.approx(load.sum())
        assert end.rank_loads(1, load).sum() == pytest.approx(load.sum())


def test_all_tokens_on_one_expert_and_on_none() -> None:
    start = Placement.contiguous(SIXTEEN, 4, 4)
    one = {1: np.eye(16)[3] * 100}
    assert start.imbalance(one) == 4.0
    end = start.rebalanced(one, 4, 1)
    assert end.copies(1)[1][3] == 5
    assert end.imbalance(one) == pytest.approx(4 * 2 / 5)
    nothing = {1: np.zeros(16)}
    assert start.rebalanced(nothing, 4, 1).layers[1].tolist() == start.layers[1].tolist()
    assert start.imbalance(nothing) == 0.0


def test_balanced_layers_stay_and_few_experts_move() -> None:
    """A balanced layer stays as it is; a shuffled one is restored."""
    rng = np.random.default_rng(0)
    load = rng.random(16)
    balanced = balanced_experts(load, 24, 4, 2, 8)
    shuffled = balanced.reshape(2, 4, 3)[::-1, rng.permutation(4)][..., [2, 0, 1]].flatten()
    shape = 2, 4, 3
    kept = keep_in_place(shuffled.reshape(shape), balanced.reshape(shape))
    assert kept.flatten().tolist() == balanced.tolist()
    placement = Placement(16, 8, {1: balanced})
    again = placement.rebalanced({1: load}, 4, 2)
    assert again.layers[1].tolist() == balanced.tolist()
    load[3] += 2
    moved = placement.rebalanced({1: load}, 4, 2).layers[1]
    fresh = balanced_experts(load, 24, 4, 2, 8)
    assert 0 < (moved != balanced).sum() < (fresh != balanced).sum()
    moved_loads, fresh_loads = (
        Placement(16, 8, {1: physical}).rank_loads(1, load) for physical in (moved, fresh)
    )
    assert sorted(moved_loads) == pytest.approx(sorted(fresh_loads))
    assert placement.rebalanced({1: load}, 4, 2, gain=0.9).layers[1].tolist() == balanced.tolist()


def test_contiguous_experts() -> None:
    placement = Placement.contiguous(SIXTEEN, 4, 8)
    assert list(placement.layers) == [1, 2, 3]
    assert (placement.num_physical, placement.physical_per_rank) == (24, 6)
    assert placement.local_experts(2, 1) == [4, 5, 6, 7, 4, 5]
    assert Placement.contiguous(SIXTEEN, 4).local_experts(1, 3) == [12, 13, 14, 15]
    with pytest.raises(ConfigError, match="4 ranks must divide 3 redundant experts and"):
        Placement.contiguous(SIXTEEN, 4, 3)
    with pytest.raises(ConfigError, match=r"3 ranks must divide n_routed_experts=16"):
        Placement.contiguous(SIXTEEN, 3)


def test_copies_of_an_expert() -> None:
    placement = Placement(4, 2, {1: np.array([3, 0, 1, 2, 0, 0])})
    copies, counts = placement.copies(1)
    assert counts.tolist() == [3, 1, 1, 1]
    assert copies.tolist() == [[1, 4, 5], [2, 2, 2], [3, 3, 3], [0, 0, 0]]


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placement = Placement.contiguous(SIXTEEN, 4, 4)
    placement.write(path)
    read = Placement.read(path)
    assert {i: n.tolist() for i, n in read.layers.items()} == {
        i: n.tolist() for i, n in placement.layers.items()
    }
    read.check(SIXTEEN, ParallelConfig(world_size=4), str(path))
    for config, world, fault in (
        (
            dataclasses.replace(SIXTEEN, n_routed_experts=8),
            4,
            "num_experts=16, but model and world have 8",
        ),
        (SIXTEEN, 2, "num_ranks=4, but model and world have 2"),
        (
            dataclasses.replace(SIXTEEN, num_hidden_layers=5),
            4,
            "layers=.1, 2, 3., but model and world have .1, 2, 3, 4.",
        ),
        (
            dataclasses.replace(SIXTEEN, num_hidden_layers=3),
            4,
            "layers=.1, 2, 3., but model and world have .1, 2.",
        ),
    ):
        with pytest.raises(ConfigError, match=fault):
            read.check(config, ParallelConfig(world_size=world), str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["placement.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_layers(tmp_path / "no" / "file", {}, {})


def test_placement_by_settings(tmp_path: Path) -> None:
    """Experts are placed only on request; impossible placements are refused before loading."""
    four = ParallelConfig(world_size=4)
    assert place_experts(EngineConfig(), SIXTEEN, four) is None
    dense = dataclasses.replace(SIXTEEN, first_k_dense_replace=4)
    assert place_experts(EngineConfig(rebalance_every=5), dense, four) is None
    placed = place_experts(EngineConfig(redundant_experts=8), SIXTEEN, four)
    assert placed is not None and placed.physical_per_rank == 6
    path = tmp_path / "placement.json"
    placed.write(path)
    settings = EngineConfig(expert_placement=str(path))
    again = place_experts(settings, SIXTEEN, four)
    assert again is not None and again.local_experts(1, 1) == placed.local_experts(1, 1)
    with pytest.raises(ConfigError, match=r"expert_placement=.*json: num_ranks=4, but"):
        place_experts(settings, SIXTEEN, ParallelConfig(world_size=2))
    with pytest.raises(ConfigError, match=r"record_expert_load=.*: there is no such directory"):
        place_experts(EngineConfig(record_expert_load=str(path / "load")), SIXTEEN, four)


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ({"1": [0, 1, 2, 2]}, "layer 1: no copy of expert 3"),
        ({"1": [0, 1, 2, 3, 3, 4]}, "layer 1: there is no expert 4"),
        ({"1": [0, 1, 2, 3, 3]}, "layer 1: 5 physical experts"),
        ({"1": [0, 1, 2, 3], "2": [0, 1, 2, 3, 0, 1]}, "layer 1: 4 physical experts"),
        ({"1": [0, 1, -2, 3]}, "with a list of numbers from 0 on"),
        ({"1": [0.5, 1]}, "with a list of numbers from 0 on"),
        ({"1": []}, "with a list of numbers from 0 on"),
        ({"1": [[0, 1], [2, 3]]}, "with a list of numbers from 0 on"),
        ({"x": [0]}, "not num_experts, num_ranks, layers with"),
        ([], "not num_experts"),
    ],
)
def test_bad_files(tmp_path: Path, layers: object, fault: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"num_experts": 4, "num_ranks": 2, "layers": layers}))
    with pytest.raises(ConfigError, match=fault):
        Placement.read(path)


def test_an_absurd_number_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    sizes = {"num_experts": 10**15, "num_ranks": 1}
    path.write_text(json.dumps({**sizes, "layers": {"1": [0, 1]}}))
    with pytest.raises(ConfigError, match="num_experts=1000000000000000, but no layer has as many"):
        Placement.read(path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        read_layers(tmp_path / "none", ())
    (tmp_path / "text").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_layers(tmp_path / "text", ("tokens",))
