"""Feed-forward layers: the dense MLP, and the mixture of routed and shared experts.

Every forward returns this rank's part of the output in float32 or the activations' dtype; the
decoder layer sums it over ranks, routed and shared experts in one all-reduce.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.parallel.experts import ExpertDispatch
from dsv3.parallel.linear import ColumnParallelLinear, RowParallelLinear
from dsv3.parallel.weights import Matrix, Vector, WeightFormat
from dsv3_kernels import Quantized, Routing, experts, route, silu_mul, silu_mul_quant


class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x), the inner dimension split over tp, in whole units."""

    def __init__(
        self,
        prefix: str,
        hidden: int,
        inner: int,
        layout: ParallelConfig,
        fmt: WeightFormat,
        unit: int = 1,
    ) -> None:
        super().__init__()
        both = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnParallelLinear(prefix, both, hidden, layout, fmt, unit)
        self.down_proj = RowParallelLinear(prefix, "down_proj", hidden, inner, layout, fmt, unit)
        self.is_empty = not any(self.gate_up_proj.rows)

    def forward(self, x_TD: Tensor, x_q: Quantized | None = None) -> Tensor:
        """Return this rank's part, [T, D]; `x_q` is x in FP8."""
        if self.is_empty:
            return torch.zeros_like(x_TD)
        gate_up_TF = self.gate_up_proj(x_TD, x_q)
        if self.down_proj.quantizes:
            return self.down_proj.product(silu_mul_quant(gate_up_TF, self.down_proj.ue8m0))
        return self.down_proj(silu_mul(gate_up_TF))


class Router(nn.Module):
    """Scores every expert for every token, in float32, the same on every rank."""

    def __init__(self, config: ModelConfig, prefix: str, fmt: WeightFormat) -> None:
        super().__init__()
        shape = (config.n_routed_experts, config.hidden_size)
        self.gate = Vector(f"{prefix}gate.weight", shape, fmt)
        # The bias belongs to the selection rule (noaux_tc), not to a model size.
        self.bias: Vector | None = None
        if config.topk_method == "noaux_tc":
            self.bias = Vector(f"{prefix}gate.e_score_correction_bias", shape[:1], fmt)
        self.rule = Routing(
            scoring_func=config.scoring_func,
            topk_method=config.topk_method,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (ids [T, K] int64, weights [T, K] float32)."""
        logits_TE = F.linear(x_TD.float(), self.gate.weight)
        return route(logits_TE, None if self.bias is None else self.bias.weight, self.rule)


class MoE(nn.Module):
    """Routed experts in contiguous ranges over the world, shared experts split over tp."""

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        layout: ParallelConfig,
        fmt: WeightFormat,
        dispatch: ExpertDispatch,
    ) -> None:
        super().__init__()
        self.dispatch = dispatch
        self.router = Router(config, prefix, replace(fmt, fp8_names=frozenset()))
        self.top_k = config.num_experts_per_tok
        self.num_local = config.n_routed_experts // layout.ep
        self.first_expert = layout.ep_rank * self.num_local
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        paths = [f"{prefix}experts.{self.first_expert + e}." for e in range(self.num_local)]
        pairs = [[f"{p}gate_proj.weight", f"{p}up_proj.weight"] for p in paths]
        self.gate_up_proj = Matrix(pairs, [inner, inner], hidden, fmt)
        self.down_proj = Matrix([[f"{p}down_proj.weight"] for p in paths], [hidden], inner, fmt)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.shared_intermediate_size
            name, unit = f"{prefix}shared_experts.", config.mlp_unit
            self.shared_experts = MLP(name, hidden, width, layout, fmt, unit)

    def forward(self, x_TD: Tensor, x_q: Quantized | None = None) -> Tensor:
        """Return this rank's part, [T, D] float32: its experts' and its share of the shared."""
        if not len(x_TD):  # an idle group's experts serve the others
            ids_TK = torch.zeros((0, self.top_k), dtype=torch.int64, device=x_TD.device)
            return self.dispatch(x_TD, ids_TK, ids_TK.float(), self.run_experts)()
        ids_TK, weight_TK = self.router(x_TD)
        combine = self.dispatch(x_TD, ids_TK, weight_TK, self.run_experts)
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD, x_q)
        y_TD = combine()
        return y_TD if shared_TD is None else y_TD.add_(shared_TD)

    def run_experts(self, x_MD: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """Return the sums over this rank's experts, [M, D] float32."""
        return experts(
            x_MD,
            ids_MK,
            weight_MK,
            self.first_expert,
            self.num_local,
            self.gate_up_proj.matrix,
            self.down_proj.matrix,
        )


def feed_forward(
    config: ModelConfig,
    layer: int,
    prefix: str,
    layout: ParallelConfig,
    fmt: WeightFormat,
    dispatch: ExpertDispatch,
) -> MLP | MoE:
    """Return the feed-forward part of decoder layer `layer`; the first ones are dense."""
    if config.is_moe_layer(layer):
        return MoE(config, prefix, layout, fmt, dispatch)
    hidden, inner = config.hidden_size, config.intermediate_size
    return MLP(prefix, hidden, inner, layout, fmt, config.mlp_unit)
