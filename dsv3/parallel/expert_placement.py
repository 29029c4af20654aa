"""Where routed experts live: which expert every physical slot of every MoE layer holds.

Rank r holds the slots r * slots_per_rank and following. With more slots than experts, the most
loaded experts have several copies and each takes its share of the tokens. `balanced_slots` is the
expert-parallel load balancer that DeepSeek published for V3.

Letters: E experts, P physical slots, L packs (nodes, ranks) that loads are packed in.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.errors import ConfigError
from dsv3.files import Format, NamedFile, write_output
from dsv3.read_files import read_mapping

Longs = NDArray[np.int64]
Floats = NDArray[np.float64]


def pack(load: Floats, num_packs: int) -> Longs:
    """Deal items to packs of equal counts, the heaviest first, each to the lightest open pack.

    Returns:
        [num_packs, items a pack]: the items of every pack, in the order they came.
    """
    size = len(load) // num_packs
    assert size * num_packs == len(load), f"{len(load)=} {num_packs=}"
    if size == 1:
        return np.arange(num_packs)[:, None]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total_L = np.zeros(num_packs)
    for item in np.argsort(-load, kind="stable").tolist():
        lightest = int(total_L.argmin())
        packs[lightest].append(item)
        total_L[lightest] += load[item]
        if len(packs[lightest]) == size:
            total_L[lightest] = np.inf
    return np.array(packs)


def replicate(load: Floats, num_slots: int) -> Longs:
    """Return the expert of each of `num_slots` slots: all once, then the most loaded again."""
    slots, copies_E = list(range(len(load))), np.ones(len(load))
    for _ in range(num_slots - len(load)):
        slots.append(int((load / copies_E).argmax()))
        copies_E[slots[-1]] += 1
    return np.array(slots)


def balanced_slots(
    load_E: ArrayLike, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Longs:
    """Spread the experts of one layer over ranks so that all are equally loaded.

    Where nodes divide the routing groups (the hierarchical policy), a group's experts stay on one
    node, so that a token whose groups are limited reaches few nodes. Otherwise (the global policy)
    nodes and groups are ignored. An expert's load is shared equally by its copies.

    Args:
        load_E: [E] tokens of every expert.
        num_slots: slots of all ranks together; a multiple of num_ranks, at least E.
        num_groups: groups of neighbouring experts; divides E.
        num_nodes: hosts; divides num_ranks.
        num_ranks: ranks.

    Returns:
        [P] the expert of every slot, rank by rank.

    Source: deepseek-ai/EPLB, README and policies "hierarchical" and "global".
    """
    load = np.asarray(load_E, np.float64)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    expert_GE = np.arange(len(load)).reshape(num_groups, -1)
    nodes = []
    for groups in pack(load[expert_GE].sum(-1), num_nodes):
        expert_E = expert_GE[groups].flatten()
        slot_P = replicate(load[expert_E], num_slots // num_nodes)
        copies_E = np.bincount(slot_P)
        share_P = (load[expert_E] / copies_E)[slot_P]
        nodes.append(expert_E[slot_P[pack(share_P, num_ranks // num_nodes)]].flatten())
    return np.concatenate(nodes)


def keep_in_place(new: Longs, old: Longs) -> Longs:
    """Rearrange a balanced layer, without changing its balance, to move few experts.

    Args:
        new: [nodes, ranks, slots] experts. Nodes are interchangeable, and so are the ranks of a
            node and the slots of a rank.
        old: the same shape; each part gets the part of `new` that shares most with it.
    """
    if new.ndim == 0:
        return new
    size = 1 + max(int(new.max()), int(old.max()))
    before, after = (
        np.stack([np.bincount(part.ravel(), minlength=size) > 0 for part in x]).astype(np.int64)
        for x in (old, new)
    )
    shared = before @ after.T
    order = np.zeros(len(old), np.int64)
    for _ in old:
        a, b = divmod(int(shared.argmax()), len(new))
        order[a] = b
        shared[a, :], shared[:, b] = -1, -1
    return np.stack([keep_in_place(new[b], old[a]) for a, b in enumerate(order)])


def _moe_layers(config: ModelConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]


@dataclass(frozen=True)
class Placement:
    """The expert of every slot.

    Attributes:
        num_experts: routed experts of a layer.
        num_ranks: ranks; each holds the same number of slots of every layer.
        layers: MoE layer -> [P] the expert of each slot.
    """

    num_experts: int
    num_ranks: int
    layers: dict[int, Longs]

    @classmethod
    def contiguous(cls, config: ModelConfig, num_ranks: int, redundant: int = 0) -> "Placement":
        """Return equal ranges of experts; each rank holds its first ones twice to fill its slots.

        Raises:
            ConfigError: the ranks cannot all hold as many.
        """
        experts = config.n_routed_experts
        share, spare = experts // num_ranks, redundant // num_ranks
        if redundant % num_ranks or experts % num_ranks:
            copies = f"{redundant} redundant experts and " if redundant else ""
            raise ConfigError(f"{num_ranks} ranks must divide {copies}n_routed_experts={experts}")
        first = np.arange(num_ranks)[:, None] * share
        slots = (first + np.arange(share + spare) % share).flatten()
        return cls(experts, num_ranks, {layer: slots.copy() for layer in _moe_layers(config)})

    @property
    def num_slots(self) -> int:
        """Slots of all ranks together, in one layer."""
        return len(next(iter(self.layers.values()), ()))

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank in one layer."""
        return self.num_slots // self.num_ranks

    def held(self, layer: int, rank: int) -> list[int]:
        """Return the experts in a rank's slots."""
        return self.layers[layer].reshape(self.num_ranks, -1)[rank].tolist()

    def copies(self, layer: int) -> tuple[Longs, Longs]:
        """Return where to find the experts of a layer.

        Returns:
            slots: [E, C] slots that hold an expert, rows filled up by repetition; C = P - E + 1
                is the most copies there can be, so the shape never changes.
            counts: [E] copies.
        """
        slot_P = self.layers[layer]
        counts = np.bincount(slot_P, minlength=self.num_experts)
        order, start = np.argsort(slot_P, kind="stable"), counts.cumsum() - counts
        nth = np.arange(len(slot_P) - self.num_experts + 1) % counts[:, None]
        return order[start[:, None] + nth], counts

    def rank_loads(self, layer: int, load_E: ArrayLike) -> Floats:
        """Return the tokens that every rank's experts get."""
        slot_P = self.layers[layer]
        share_E = np.asarray(load_E, np.float64) / np.bincount(slot_P, minlength=self.num_experts)
        return share_E[slot_P].reshape(self.num_ranks, -1).sum(1)

    def imbalance(self, loads: Mapping[int, ArrayLike]) -> float:
        """Return max / mean load of a rank, the layers' maxima and means summed."""
        ranks = np.stack([self.rank_loads(layer, load) for layer, load in loads.items()])
        return float(ranks.max(1).sum() / max(ranks.mean(1).sum(), 1e-9))

    def rebalanced(
        self, loads: Mapping[int, ArrayLike], num_groups: int, num_nodes: int, gain: float = 0.0
    ) -> "Placement":
        """Return a placement balanced for these loads, which moves no more than it must.

        A layer is left alone unless its most loaded rank sheds more than a share `gain`.
        """
        layers = dict(self.layers)
        if num_groups % num_nodes or self.num_ranks % num_nodes:
            num_nodes = 1  # the global policy
        shape = num_nodes, -1, self.slots_per_rank
        for layer, load_E in loads.items():
            slots = balanced_slots(load_E, self.num_slots, num_groups, num_nodes, self.num_ranks)
            slots = keep_in_place(slots.reshape(shape), layers[layer].reshape(shape)).flatten()
            new = replace(self, layers={layer: slots})
            before, after = (p.rank_loads(layer, load_E).max() for p in (self, new))
            if after < (1 - gain) * before:
                layers[layer] = slots
        return replace(self, layers=layers)

    def check(self, config: ModelConfig, layout: ParallelConfig, where: str) -> None:
        """Raise ConfigError where this does not fit the model or the world."""
        for name, ours, theirs in (
            ("num_experts", self.num_experts, config.n_routed_experts),
            ("num_ranks", self.num_ranks, layout.ep),
            ("layers", sorted(self.layers), _moe_layers(config)),
        ):
            if ours != theirs:
                raise ConfigError(f"{where}: {name}={ours}, but model and world have {theirs}")

    def write(self, path: Path) -> None:
        """Write a JSON file."""
        sizes = {"num_experts": self.num_experts, "num_ranks": self.num_ranks}
        write_layers(path, sizes, self.layers)

    @classmethod
    def read(cls, path: Path) -> "Placement":
        """Read what `write` wrote.

        Raises:
            ConfigError: it cannot be read, or a layer lacks an expert.
        """
        (experts, ranks), layers = read_layers(path, ("num_experts", "num_ranks"))
        size = max(len(slots) for slots in layers.values())
        if experts > size:
            raise ConfigError(f"{path}: num_experts={experts}, but no layer has as many slots")
        for layer, slots in layers.items():
            if odd := set(range(experts)) ^ set(slots.tolist()):
                fault = "no slot with" if min(odd) < experts else "there is no"
                raise ConfigError(f"{path}: layer {layer}: {fault} expert {min(odd)}")
            if len(slots) != size or size % ranks:
                rule = f"all layers need the same number, a multiple of num_ranks={ranks}"
                raise ConfigError(f"{path}: layer {layer}: {len(slots)} slots; {rule}")
        return cls(experts, ranks, layers)


def write_layers(path: Path, sizes: Mapping[str, int], layers: Mapping[int, Longs]) -> None:
    """Write numbers of every layer as JSON, all of it or nothing.

    Raises:
        OutputError: it cannot be written, or another file is there.
    """
    text = json.dumps({**sizes, "layers": {str(i): n.tolist() for i, n in layers.items()}})
    write_output(NamedFile("", path), layers_format(sizes), text + "\n")


def layers_format(sizes: Iterable[str]) -> Format:
    """Return the format of the files that `write_layers` makes with sizes of these names."""
    keys = r",\s*".join([*(rf'"{name}":\s*\d+' for name in sizes), '"layers":'])
    what = "a placement of experts" if "num_ranks" in keys else "loads of experts"
    return Format(what, re.compile(rf"\{{\s*{keys}".encode()))


def read_layers(path: Path, sizes: tuple[str, ...]) -> tuple[list[int], dict[int, Longs]]:
    """Read what `write_layers` wrote: the sizes of these names, and the layers' numbers.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    data = read_mapping(path)
    try:
        layers = {int(i): np.array(data["layers"][i]) for i in sorted(data["layers"], key=int)}
        numbers = [int(data[name]) for name in sizes]
        is_right = min([len(layers), *numbers]) > 0 and all(
            n.ndim == 1 and n.dtype == np.int64 and n.size and n.min() >= 0 for n in layers.values()
        )
    except (ValueError, KeyError, TypeError):
        is_right = False
    if not is_right:
        wanted = ", ".join([*sizes, "layers"])
        raise ConfigError(f"{path}: not {wanted} with a list of numbers from 0 on for each layer")
    return numbers, layers
