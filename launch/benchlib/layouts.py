"""The ways to split a model over ranks, with the memory and the step time of each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from benchlib.experts_hit import busiest_hits
from benchlib.hardware import Hardware
from benchlib.operation import Op
from benchlib.random_weights import random_format
from benchlib.roofline import RooflineSetup, step_ops
from benchlib.step_shape import StepShape
from dsv3.cache.layout import CacheLayout
from dsv3.config import ModelConfig, ParallelConfig, divisors
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine.memory import plan_memory, weight_bytes
from dsv3.errors import ConfigError
from dsv3.settings import EngineConfig

_NO_LIMIT = 1_000_000  # sequences and tokens of a step


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to split a model over ranks.

    Attributes:
        setup: the model on its ranks.
        dispatch: how tokens of several dp groups reach their experts: "alltoall" or "allreduce".
    """

    setup: RooflineSetup
    dispatch: str

    def ops(self, load: StepShape) -> list[Op]:
        """Return the operations of a step that has this load in every dp group.

        Their rank is the one with the most experts hit.
        """
        place = self.setup.layout
        hits = busiest_hits(self.setup.config, place.ep, load.tokens * place.dp)
        ops = step_ops(self.setup, replace(load, hits=hits))
        return [self._as_dispatched(op, load.tokens) for op in ops]

    def seconds(self, load: StepShape, hw: Hardware) -> float:
        """Return the time of a step: the floors of all operations, and their launches."""
        if not load.tokens:
            return 0.0
        return sum(op.seconds(hw) + op.count * hw.launch for op in self.ops(load))

    def flags(self) -> str:
        """Return the flags of launch/generate.py that select the layout."""
        place = self.setup.layout
        dispatch = f" --moe-dispatch {self.dispatch}" if place.dp > 1 else ""
        return f"--tp {place.tp} --dp {place.dp} --kv-shard {self.setup.kv_shard}{dispatch}"

    def _as_dispatched(self, op: Op, tokens: int) -> Op:
        """Return an exchange with the bytes of an "allreduce" dispatch; other operations as is."""
        dp = self.setup.layout.dp
        if self.dispatch != "allreduce" or op.name not in ("moe.dispatch", "moe.combine"):
            return op
        is_packed = op.name == "moe.dispatch" and self.setup.weights == "fp8"
        size = 1 if is_packed else 4 if self.setup.plain == "fp32" else 2
        num_bytes = float(tokens * self.setup.config.hidden_size * size)
        return replace(op, bytes=(1 + dp) * num_bytes, wire=(dp - 1) * num_bytes)


def layouts(model: RooflineSetup, ranks: int) -> Iterator[Layout]:
    """Yield every layout of a model on a number of ranks."""
    config = model.config
    for tp in divisors(ranks):
        if config.num_attention_heads % tp or config.n_routed_experts % ranks:
            continue
        place = ParallelConfig(world_size=ranks, tp=tp, dp=ranks // tp)
        for kv_shard in ("tokens", "none") if tp > 1 else ("none",):
            for dispatch in ("alltoall", "allreduce") if place.dp > 1 else ("allreduce",):
                yield Layout(replace(model, layout=place, kv_shard=kv_shard), dispatch)


@cache
def weights_of(config: ModelConfig, layout: ParallelConfig, weights: str) -> int:
    """Return the bytes of a rank's weights in a format."""
    meta = torch.device("meta")
    fmt = random_format(config, weights, meta)
    return weight_bytes(config, stand_in_mesh(layout, meta), fmt)


def memory(setup: RooflineSetup, hw: Hardware) -> tuple[int, int]:
    """Return the bytes of a rank's weights, and the positions that fit all caches beside them."""
    config = setup.config
    place = setup.layout
    weights = weights_of(config, place, setup.weights)
    cache = CacheLayout.make(config, setup.form, setup.kv_shard, setup.cache, place.tp, 0)
    settings = EngineConfig(max_running=_NO_LIMIT, max_batch_tokens=_NO_LIMIT)
    max_seq_len = config.max_position_embeddings
    device = torch.device("cuda")
    try:
        plan = plan_memory(settings, cache, weights, max_seq_len, int(hw.memory), device)
    except ConfigError:
        return weights, 0
    return weights, place.dp * plan.cache_tokens
