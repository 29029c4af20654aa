"""Balances experts over ranks while a model runs: counts loads, moves experts between steps."""

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.files import NamedFile, check_output
from dsv3.model.moe import MoE
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_placement import Longs, Placement, layers_format, write_layers
from dsv3.settings import EngineConfig

log = logging.getLogger(__name__)

# A layer's experts are moved if that takes this share off its most loaded rank.
_GAIN = 0.05
# Weight of the loads before the last rebalancing, against the loads since.
_MEMORY = 0.5


def moves(old_P: Longs, new_P: Longs, num_ranks: int, ranks_on_host: int) -> list[tuple[int, int]]:
    """Return (from, to) for every physical expert that becomes a copy of another expert.

    An expert comes from the rank itself, else from its host, else from any rank that has it.
    """
    size = len(old_P) // num_ranks
    total = len(old_P)

    def distance(to: int, at: int) -> tuple[bool, bool, int]:
        host = size * ranks_on_host
        return at // size != to // size, at // host != to // host, (at - to) % total

    changed = np.flatnonzero(old_P != new_P).tolist()
    holders = (np.flatnonzero(old_P == new_P[to]).tolist() for to in changed)
    pairs = zip(holders, changed, strict=True)
    return [(min(at, key=partial(distance, to)), to) for at, to in pairs]


def place_experts(
    settings: EngineConfig, config: ModelConfig, layout: ParallelConfig
) -> Placement | None:
    """Return the placement of experts; None for equal ranges whose loads are not recorded.

    Raises:
        ConfigError: the placement file does not fit the model, or the loads cannot be written.
    """
    if layout.rank == 0 and settings.record_expert_load:
        file = NamedFile(settings.named("record_expert_load"), Path(settings.record_expert_load))
        check_output(file, layers_format(["num_experts"]))
    wanted = settings.expert_placement, settings.redundant_experts, settings.rebalance_every
    has_experts = config.first_k_dense_replace < config.num_hidden_layers
    if not has_experts or not any((*wanted, settings.record_expert_load)):
        return None
    if not settings.expert_placement:
        return Placement.contiguous(config, layout.ep, settings.redundant_experts)
    placement = Placement.read(Path(settings.expert_placement))
    placement.check(config, layout, settings.given("expert_placement"))
    return placement


class Balancer:
    """One rank's part of expert balancing. Every method is called on all ranks, at the same step.

    Args:
        model: this rank's model, loaded as `placement` says.
        mesh: the ranks.
        placement: the ranks of the experts.
        settings: the steps between rebalancings, and the file for the loads.
    """

    def __init__(
        self, model: Transformer, mesh: Mesh, placement: Placement, settings: EngineConfig
    ) -> None:
        self.placement = placement
        self._mesh = mesh
        self._num_groups = model.config.n_group
        self._every = settings.rebalance_every
        self._file = settings.record_expert_load
        self._physical_experts = list(model.dispatch.physical_experts.values())
        found = (module for module in model.layers.modules() if isinstance(module, MoE))
        self._layers = dict(zip(placement.layers, found, strict=True))
        shape = len(self._physical_experts), placement.num_experts
        self._total = np.zeros(shape, np.int64)
        self._recent = np.zeros(shape)
        self._steps = 0
        self._take_counts()  # drops the counts of the warm-up

    def before_step(self) -> None:
        """Count a step; at every `rebalance_every`-th step, move experts to a better placement."""
        self._steps += 1
        if not self._every or self._steps % self._every:
            return
        self._recent = _MEMORY * self._recent + self._count()
        begin = time.perf_counter()
        old = self.placement
        loads = dict(zip(self._layers, self._recent, strict=True))
        new = old
        if self._mesh.layout.rank == 0:
            num_nodes = max(1, old.num_ranks // self._mesh.ranks_on_host)
            new = old.rebalanced(loads, self._num_groups, num_nodes, _GAIN)
        layers_LP = torch.from_numpy(np.stack(list(new.layers.values())))
        agreed = self._mesh.control.broadcast(layers_LP).numpy()
        self.placement = replace(old, layers=dict(zip(self._layers, agreed, strict=True)))
        moved = sum(self._move(layer, old.layers[layer]) for layer in self._layers)
        for experts in self._physical_experts:
            experts.place(self.placement)
        busiest = f"{self.placement.imbalance(loads):.2f}, was {old.imbalance(loads):.2f}"
        seconds = time.perf_counter() - begin
        text = "step %d: %d experts moved in %.2f s; load of the busiest rank / mean %s"
        log.info(text, self._steps, moved, seconds, busiest)

    def finish(self) -> None:
        """Write the number of tokens that every expert got, from rank 0."""
        if not self._file:
            return
        self._count()
        if self._mesh.layout.rank == 0:
            loads = dict(zip(self._layers, self._total, strict=True))
            write_layers(Path(self._file), {"num_experts": self.placement.num_experts}, loads)

    def _count(self) -> Longs:
        """Return the tokens of every layer's experts since the last call, over all groups."""
        new = self._mesh.dp.all_reduce(self._take_counts()).cpu().numpy()
        self._total += new
        return new

    def _take_counts(self) -> Tensor:
        """Return this rank's counts since the last call, and reset them."""
        mine = torch.stack([experts.load_E for experts in self._physical_experts])
        for experts in self._physical_experts:
            experts.load_E.zero_()
        return mine

    def _move(self, layer: int, old_P: Longs) -> int:
        """Bring the experts of one layer to their new places; return the number of moved ones."""
        world = self._mesh.world
        size = self.placement.physical_per_rank
        rank = world.rank
        module = self._layers[layer]
        found = moves(old_P, self.placement.layers[layer], world.size, self._mesh.ranks_on_host)
        if not found:
            return 0
        within = [(a % size, b % size) for a, b in found if a // size == b // size == rank]
        # (peer, physical expert, its index on this rank), sorted: both sides have the same order.
        outgoing = sorted(
            (b // size, b, a % size) for a, b in found if a // size == rank != b // size
        )
        incoming = sorted(
            (a // size, b, b % size) for a, b in found if b // size == rank != a // size
        )
        num_sent = _counts_by_peer(outgoing, world.size)
        num_received = _counts_by_peer(incoming, world.size)
        for matrix in (module.gate_up_proj, module.down_proj):
            kept = matrix.take([source for source, _ in within])
            sent = matrix.take([index for _, _, index in outgoing])
            received = [
                world.start_exchange(x, num_sent, num_received, "experts").wait() for x in sent
            ]
            matrix.put([target for _, target in within], kept)
            matrix.put([index for _, _, index in incoming], received)
        return len(found)


def _counts_by_peer(transfers: list[tuple[int, int, int]], num_ranks: int) -> list[int]:
    """Return the number of transfers with each rank; the peer comes first in a transfer."""
    peers = [peer for peer, _, _ in transfers]
    return [peers.count(rank) for rank in range(num_ranks)]
