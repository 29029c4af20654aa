"""One rank's share of a model, with random weights: model, cache and step plans."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchlib.experts_hit import mean_hits
from benchlib.random_weights import random_format
from benchlib.roofline import RooflineSetup
from benchlib.step_shape import ExpertHits, StepKind
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine.runner import Runner
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.moe import MoE
from dsv3.model.transformer import Transformer
from dsv3.settings import CacheDtype, EngineConfig, KvShard
from dsv3_kernels.fp8_format import FP8

_PLANS = 10  # plans that are drawn for the usual number of experts
_NEAR = 0.05  # share of that number by which a plan may differ from it
_ALL_HIT = 0.95  # share of the local experts from which on plans do not differ


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """The share of a model that one rank holds, and its storage formats.

    Attributes:
        world: number of ranks.
        layers: number of first layers to keep, at most one of them dense; 0 keeps all.
        weights: "fp8", "int8", "int4", "bf16" or "fp32".
        cache: "fp8", "bf16" or "fp32".
        moves: exchanges write their bytes to memory; otherwise they cost next to nothing.
    """

    config: ModelConfig
    world: int
    rank: int = 0
    layers: int = 0
    weights: str = "fp8"
    cache: CacheDtype = "bf16"
    kv_shard: KvShard = "tokens"
    moves: bool = True
    seed: int = 0

    @property
    def cut(self) -> ModelConfig:
        """Config of the model with the kept layers."""
        c = self.config
        if not self.layers or self.layers >= c.num_hidden_layers:
            return c
        dense = min(1, c.first_k_dense_replace)
        return replace(c.first_layers(self.layers), first_k_dense_replace=dense)


@dataclass(frozen=True, slots=True)
class DrawnPlan:
    """A plan, and the use of the rank's experts in it."""

    plan: StepPlan
    hits: ExpertHits


class Rank:
    """A rank's share of a model, ready to run.

    Args:
        shape: the share.
        device: device to allocate it on.
        positions: number of positions of all sequences that fit the cache.
    """

    def __init__(self, shape: RankShape, device: torch.device, positions: int) -> None:
        self.shape = shape
        self.config = shape.cut
        self.device = device
        layout = ParallelConfig(world_size=shape.world, rank=shape.rank)
        layout.check(self.config)
        torch.manual_seed(shape.seed)
        self._mesh = stand_in_mesh(layout, device, shape.moves)
        self.model = self._make_model()
        cached = CacheLayout.make(
            self.config, "latent", shape.kv_shard, shape.cache, layout.tp, layout.tp_rank
        )
        pages = positions // cached.page_size
        slots = cached.paging.slots_per_page
        self.cache = CachePool(cached, pages + 1, device, self._mesh.tp)
        for layer in range(self.config.num_hidden_layers):  # a cache of zeros would cost less power
            page = torch.randn(slots, cached.main.width, device=device)
            layer_cache = self.cache.layer(layer)
            layer_cache.write(torch.arange(slots, device=device), page)
            slots_by_page = layer_cache.slots.view(pages + 1, -1)
            slots_by_page[1:] = slots_by_page[0]
        self._rng = np.random.default_rng(shape.seed)
        self._rule = AbsorbRule.make(self.config, EngineConfig())

    @property
    def setup(self) -> RooflineSetup:
        """The setup for roofline floors."""
        return RooflineSetup(
            config=self.config,
            layout=self._mesh.layout,
            weights=self.shape.weights,
            cache=self.shape.cache,
            kv_shard=self.shape.kv_shard,
        )

    def new_runner(self, eager: bool = False) -> Runner:
        """Return a new runner of the share."""
        static = self.device.type == "cuda" and not eager
        return Runner(self.model, self.cache, self._rule, static=static)

    def _make_model(self) -> Transformer:
        weight_format = random_format(self.config, self.shape.weights, self.device)
        model = Transformer(self.config, self._mesh, weight_format)
        for target in model.targets():
            fill_weight(target.dest, target.name)
            if target.scale is not None:
                largest = {torch.int8: 64.0, torch.uint8: 4.0}.get(target.dest.dtype, 1.0)
                target.scale.fill_(max(1, target.dest.shape[1]) ** -0.5 / largest)
        model.pack_weights()
        return model.eval()

    def plan(self, step: StepKind) -> StepPlan:
        """Return a plan of the step with random tokens.

        They are from this rank's part of the vocabulary; others would be embedded as zeros.
        """
        embed = self.model.embed_tokens
        tokens = embed.start + self._rng.integers(0, embed.rows, step.num_tokens)
        return step.plan(tokens.astype(np.int32), self.cache.layout.page_size)

    def usual_plan(self, step: StepKind) -> DrawnPlan:
        """Return the plan, of several, whose use of the local experts is nearest to the mean.

        The tokens of one plan may reach none of the rank's experts, or twice as many as they do on
        average, and the time of a MoE layer follows that number.
        """
        num_local = self.config.n_routed_experts // self.shape.world
        usual = mean_hits(self.config, self.shape.world, step.num_tokens).experts
        has_moe = any(isinstance(module, MoE) for module in self.model.modules())
        depends = has_moe and usual < _ALL_HIT * num_local
        best = None
        for _ in range(_PLANS if depends else 1):
            plan = self.plan(step)
            drawn = DrawnPlan(plan, self.count_hits(plan))
            distance = abs(drawn.hits.experts - usual)
            if best is None or distance < abs(best.hits.experts - usual):
                best = drawn
            if distance < _NEAR * usual:
                break
        assert best is not None
        return best

    def count_hits(self, plan: StepPlan) -> ExpertHits:
        """Run a step; return the use of the local experts, mean of the MoE layers."""
        num_local = self.config.n_routed_experts // self.shape.world
        hits: list[tuple[int, int]] = []
        hooks = []

        def count(first: int, _module: object, _x: object, out: tuple[Tensor, Tensor]) -> None:
            ids = out[0][(out[0] >= first) & (out[0] < first + num_local)]
            hits.append((len(ids.unique()), len(ids)))

        for moe in self.model.modules():
            if isinstance(moe, MoE):
                hooks.append(moe.router.register_forward_hook(partial(count, moe.local.first)))
        Runner(self.model, self.cache, self._rule).run([plan])
        for hook in hooks:
            hook.remove()
        return ExpertHits(*np.mean(hits or [(0, 0)], axis=0).tolist())


def fill_weight(weight: Tensor, name: str) -> None:
    """Fill a weight with random values about as large as a trained model's.

    The embedding dominates the hidden states, so they differ between tokens in all layers, and so
    do the experts that tokens are routed to.
    """
    if weight.dtype == torch.int8:
        weight.random_(-127, 128)
    elif weight.dtype == torch.uint8:  # two values of -7 to 7: a mean would make experts alike
        weight.copy_(torch.empty_like(weight).random_(1, 16) + 16 * weight.random_(1, 16))
    elif weight.dtype == FP8:
        weight.view(torch.uint8).random_(0, 256).bitwise_and_(0xBF)  # no exponent above 2, no NaN
    elif weight.dim() == 1:  # a router's bias of 0 makes no expert popular
        weight.fill_(0.0 if name.endswith("e_score_correction_bias") else 1.0)
    elif "embed_tokens" in name:
        weight.normal_()
    elif weight.numel():
        weight.normal_(std=weight.shape[-1] ** -0.5)
