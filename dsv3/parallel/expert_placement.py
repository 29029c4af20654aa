"""Expert placement: the routed (logical) expert of every physical expert of every MoE layer.

Rank r has the physical experts from r * physical_per_rank on. With more of them than experts, the
most loaded experts have several copies, which share their tokens. `balanced_experts` is the
expert-parallel load balancer (EPLB) that DeepSeek published for V3.

Letters: E experts, P physical experts, L packs (nodes or ranks).
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


def pack_balanced(load: Floats, num_packs: int) -> Longs:
    """Distribute items to packs of equal counts: the heaviest first, to the lightest open pack.

    Returns:
        [num_packs, items per pack]: the items of each pack, in the order of distribution.
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


def replicate(load: Floats, num_physical: int) -> Longs:
    """Return the expert of each physical one: all once, then more copies of the most loaded."""
    experts = list(range(len(load)))
    copies_E = np.ones(len(load))
    for _ in range(num_physical - len(load)):
        experts.append(int((load / copies_E).argmax()))
        copies_E[experts[-1]] += 1
    return np.array(experts)


def balanced_experts(
    load_E: ArrayLike, num_physical: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Longs:
    """Distribute the experts of one layer over ranks with equal loads.

    If the number of nodes divides the number of routing groups (hierarchical policy), a group's
    experts stay on one node, so that group-limited routing reaches few nodes. Otherwise (global
    policy) nodes and groups are ignored. An expert's load is shared equally by its copies.

    Args:
        load_E: [E] tokens of every expert.
        num_physical: physical experts of all ranks; a multiple of num_ranks, at least E.
        num_groups: groups of neighbouring experts; divides E.
        num_nodes: hosts; divides num_ranks.
        num_ranks: ranks.

    Returns:
        [P] the expert of every physical expert, rank by rank.

    Source: deepseek-ai/EPLB, README and policies "hierarchical" and "global".
    """
    load = np.asarray(load_E, np.float64)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    expert_GE = np.arange(len(load)).reshape(num_groups, -1)
    nodes = []
    for groups in pack_balanced(load[expert_GE].sum(-1), num_nodes):
        expert_E = expert_GE[groups].flatten()
        index_P = replicate(load[expert_E], num_physical // num_nodes)
        copies_E = np.bincount(index_P)
        share_P = (load[expert_E] / copies_E)[index_P]
        ranks = pack_balanced(share_P, num_ranks // num_nodes)
        nodes.append(expert_E[index_P[ranks]].flatten())
    return np.concatenate(nodes)


def keep_in_place(new: Longs, old: Longs) -> Longs:
    """Rearrange a balanced layer, without changing its balance, to move few experts.

    Args:
        new: [nodes, ranks, experts of a rank]. Nodes are interchangeable, and so are the ranks of
            a node and the experts of a rank.
        old: the same shape, the layer before. Each of its parts is replaced by the part of `new`
            with most experts in common.
    """
    if new.ndim == 0:
        return new
    num_experts = 1 + max(int(new.max()), int(old.max()))
    num_common = _membership(old, num_experts) @ _membership(new, num_experts).T
    new_part_of_old = np.zeros(len(old), np.int64)
    for _ in old:
        old_part, new_part = divmod(int(num_common.argmax()), len(new))
        new_part_of_old[old_part] = new_part
        num_common[old_part, :] = -1
        num_common[:, new_part] = -1
    return np.stack([keep_in_place(new[b], old[a]) for a, b in enumerate(new_part_of_old)])


def _membership(parts: Longs, num_experts: int) -> Longs:
    """Return [parts, num_experts]: 1 where the part has the expert, else 0."""
    rows = [np.bincount(part.ravel(), minlength=num_experts) > 0 for part in parts]
    return np.stack(rows).astype(np.int64)


def _moe_layers(config: ModelConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]


@dataclass(frozen=True)
class Placement:
    """The expert of every physical expert of the MoE layers.

    Attributes:
        num_experts: routed experts of a layer.
        num_ranks: ranks; each has the same number of physical experts in every layer.
        layers: MoE layer -> [P] the expert of each physical expert.
    """

    num_experts: int
    num_ranks: int
    layers: dict[int, Longs]

    @classmethod
    def contiguous(cls, config: ModelConfig, num_ranks: int, redundant: int = 0) -> "Placement":
        """Return equal ranges of experts, with copies of each rank's first experts.

        Args:
            config: the model.
            num_ranks: ranks.
            redundant: copies of all ranks together, in each layer.

        Raises:
            ConfigError: num_ranks does not divide the number of experts or of copies.
        """
        num_experts = config.n_routed_experts
        if redundant % num_ranks or num_experts % num_ranks:
            copies = f"{redundant} redundant experts and " if redundant else ""
            raise ConfigError(
                f"{num_ranks} ranks must divide {copies}n_routed_experts={num_experts}"
            )
        per_rank = num_experts // num_ranks
        copies_per_rank = redundant // num_ranks
        first = np.arange(num_ranks)[:, None] * per_rank
        expert_P = (first + np.arange(per_rank + copies_per_rank) % per_rank).flatten()
        layers = {layer: expert_P.copy() for layer in _moe_layers(config)}
        return cls(num_experts, num_ranks, layers)

    @property
    def num_physical(self) -> int:
        """Physical experts of a layer, over all ranks."""
        return len(next(iter(self.layers.values()), ()))

    @property
    def physical_per_rank(self) -> int:
        """Physical experts of a layer on one rank."""
        return self.num_physical // self.num_ranks

    def local_experts(self, layer: int, rank: int) -> list[int]:
        """Return the expert of each of a rank's physical experts."""
        return self.layers[layer].reshape(self.num_ranks, -1)[rank].tolist()

    def copies(self, layer: int) -> tuple[Longs, Longs]:
        """Return the physical experts of each expert of a layer.

        Returns:
            copies: [E, C] the copies of each expert, repeated cyclically; C = P - E + 1 is the
                maximal number of copies, so the shape never changes.
            counts: [E] number of copies.
        """
        expert_P = self.layers[layer]
        counts = np.bincount(expert_P, minlength=self.num_experts)
        physical_by_expert = np.argsort(expert_P, kind="stable")
        start = counts.cumsum() - counts
        copy_EC = np.arange(len(expert_P) - self.num_experts + 1) % counts[:, None]
        return physical_by_expert[start[:, None] + copy_EC], counts

    def rank_loads(self, layer: int, load_E: ArrayLike) -> Floats:
        """Return the number of tokens of each rank, [num_ranks], given those of each expert."""
        expert_P = self.layers[layer]
        copies_E = np.bincount(expert_P, minlength=self.num_experts)
        share_E = np.asarray(load_E, np.float64) / copies_E
        return share_E[expert_P].reshape(self.num_ranks, -1).sum(1)

    def imbalance(self, loads: Mapping[int, ArrayLike]) -> float:
        """Return max / mean load of a rank, after summing maxima and means over the layers."""
        ranks = np.stack([self.rank_loads(layer, load) for layer, load in loads.items()])
        return float(ranks.max(1).sum() / max(ranks.mean(1).sum(), 1e-9))

    def rebalanced(
        self, loads: Mapping[int, ArrayLike], num_groups: int, num_nodes: int, gain: float = 0.0
    ) -> "Placement":
        """Return a placement balanced for these loads that moves few experts.

        A layer changes only if the load of its most loaded rank falls by more than the share
        `gain`.

        Args:
            loads: MoE layer -> [E] tokens of every expert.
            num_groups: routing groups.
            num_nodes: hosts.
            gain: 0 to 1.
        """
        layers = dict(self.layers)
        if num_groups % num_nodes or self.num_ranks % num_nodes:
            num_nodes = 1  # the global policy
        shape = num_nodes, -1, self.physical_per_rank
        for layer, load_E in loads.items():
            balanced = balanced_experts(
                load_E, self.num_physical, num_groups, num_nodes, self.num_ranks
            )
            old = layers[layer].reshape(shape)
            expert_P = keep_in_place(balanced.reshape(shape), old).flatten()
            new = replace(self, layers={layer: expert_P})
            load_before = self.rank_loads(layer, load_E).max()
            load_after = new.rank_loads(layer, load_E).max()
            if load_after < (1 - gain) * load_before:
                layers[layer] = expert_P
        return replace(self, layers=layers)

    def check(self, config: ModelConfig, layout: ParallelConfig, where: str) -> None:
        """Check that the placement fits the model and the world.

        Args:
            config: the model.
            layout: the world.
            where: file or flag, for the error.

        Raises:
            ConfigError: it does not fit.
        """
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
        """Return the placement in a file made by `write`.

        Raises:
            ConfigError: the file cannot be read, or a layer lacks an expert.
        """
        (experts, ranks), layers = read_layers(path, ("num_experts", "num_ranks"))
        size = max(len(expert_P) for expert_P in layers.values())
        if experts > size:
            raise ConfigError(f"{path}: num_experts={experts}, but no layer has as many")
        for layer, expert_P in layers.items():
            if odd := set(range(experts)) ^ set(expert_P.tolist()):
                fault = "no copy of" if min(odd) < experts else "there is no"
                raise ConfigError(f"{path}: layer {layer}: {fault} expert {min(odd)}")
            if len(expert_P) != size or size % ranks:
                rule = f"all layers need the same number, a multiple of num_ranks={ranks}"
                raise ConfigError(
                    f"{path}: layer {layer}: {len(expert_P)} physical experts; {rule}"
                )
        return cls(experts, ranks, layers)


def write_layers(path: Path, sizes: Mapping[str, int], layers: Mapping[int, Longs]) -> None:
    """Write arrays of every layer as JSON, atomically.

    Args:
        path: of the file.
        sizes: further entries of the JSON object.
        layers: MoE layer -> array.

    Raises:
        OutputError: the file cannot be written, or a file of another kind exists there.
    """
    text = json.dumps({**sizes, "layers": {str(i): n.tolist() for i, n in layers.items()}})
    write_output(NamedFile("", path), layers_format(sizes), text + "\n")


def layers_format(sizes: Iterable[str]) -> Format:
    """Return the format of the files that `write_layers` makes with sizes of these names."""
    keys = r",\s*".join([*(rf'"{name}":\s*\d+' for name in sizes), '"layers":'])
    description = "a placement of experts" if "num_ranks" in keys else "loads of experts"
    return Format(description, re.compile(rf"\{{\s*{keys}".encode()))


def read_layers(path: Path, sizes: tuple[str, ...]) -> tuple[list[int], dict[int, Longs]]:
    """Return the sizes of these names and the layers' arrays in a file made by `write_layers`.

    Raises:
        ConfigError: the file cannot be read or is of another kind.
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
