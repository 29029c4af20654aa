"""Feed-forward layers: the dense MLP, and the mixture of routed and shared experts.

Each forward returns this rank's part of the output, in float32 or the activations' dtype; the next
layer sums it over tp, routed and shared experts in one all-reduce.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv3.config import ModelConfig, ParallelConfig, split_range
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch, StepTokens
from dsv3.parallel.linear import ColumnParallelLinear, RowParallelLinear
from dsv3.parallel.module import Module
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix, Vector
from dsv3_kernels import (
    Groups,
    LocalExperts,
    Quantized,
    RouterInput,
    Routing,
    act_quant,
    experts,
    int8_quant,
    make_locks,
    route,
    route_and_permute,
    router_logits,
    silu_mul,
    silu_mul_quant,
    takes_int8_rows,
)

# Up to this number of tokens the shared experts run in parallel with the routed experts: larger
# steps keep a GPU busy anyway. An estimate, not measured on a GPU.
_OVERLAP_TOKENS = 256


class MLP(Module):
    """W_down (silu(W_gate x) * W_up x), with `inner` split over tp in multiples of `unit`."""

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
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnParallelLinear(prefix, parts, hidden, layout, fmt, unit)
        self.down_proj = RowParallelLinear(prefix, "down_proj", hidden, inner, layout, fmt, unit)
        self.is_empty = not any(self.gate_up_proj.rows)

    def forward(self, x_TD: Tensor, x_q: Quantized | None = None) -> Tensor:
        """Return this rank's part, [T, D]; `x_q` is x in FP8."""
        if self.is_empty:
            return torch.zeros_like(x_TD)
        gate_up_TF = self.gate_up_proj(x_TD, x_q)
        if self.down_proj.quantizes:
            return self.down_proj(silu_mul_quant(gate_up_TF, self.down_proj.ue8m0))
        return self.down_proj(silu_mul(gate_up_TF))


class Router(Module):
    """Chooses experts for every token, in float32, with the same result on all tp ranks."""

    def __init__(self, config: ModelConfig, prefix: str, fmt: WeightFormat) -> None:
        super().__init__()
        shape = (config.n_routed_experts, config.hidden_size)
        self.gate = Vector(f"{prefix}gate.weight", shape, fmt)
        self.locks = make_locks(self.gate.weight)
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

    def forward(
        self,
        x_TD: Tensor,
        position_T: Tensor | None = None,
        local: LocalExperts | None = None,
    ) -> tuple[Tensor, Tensor, Groups | None]:
        """Return expert ids [T, K] int64, weights [T, K] float32, and the groups of local experts.

        Rows at position -1 choose no expert. Groups are None without `local`, and on a CPU.
        """
        router = RouterInput(
            logits_STE=router_logits(x_TD, self.gate.weight),
            bias_E=None if self.bias is None else self.bias.weight,
            rule=self.rule,
            position_T=position_T,
        )
        if local is None:
            ids_TK, weight_TK = route(router)
            return ids_TK, weight_TK, None
        return route_and_permute(router, local, self.locks)


class MoE(Module):
    """Routed experts distributed over the world, shared experts split over tp.

    Each rank has an equal range of the experts, or of the physical experts of the placement.
    """

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        layout: ParallelConfig,
        fmt: WeightFormat,
        dispatch: ExpertDispatch,
        side: SideStream,
    ) -> None:
        super().__init__()
        self.dispatch = dispatch
        self.side = side
        self.spread = layout.ep
        self.physical_experts = dispatch.physical_experts.get(prefix)
        self.router = Router(config, prefix, fmt)
        self.top_k = config.num_experts_per_tok
        local = list(range(*split_range(config.n_routed_experts, layout.ep, layout.ep_rank)))
        if self.physical_experts is not None:
            local = self.physical_experts.local_experts
        self.local = LocalExperts(first=layout.ep_rank * len(local), count=len(local))
        hidden = config.hidden_size
        inner = config.moe_intermediate_size
        prefixes = [f"{prefix}experts.{e}." for e in local]
        gate_up_names = [[f"{p}gate_proj.weight", f"{p}up_proj.weight"] for p in prefixes]
        self.gate_up_proj = Matrix(gate_up_names, [inner, inner], hidden, fmt)
        down_names = [[f"{p}down_proj.weight"] for p in prefixes]
        self.down_proj = Matrix(down_names, [hidden], inner, fmt)
        self._int8_products = self.gate_up_proj.int8_products and self.down_proj.int8_products
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            self.shared_experts = MLP(
                f"{prefix}shared_experts.",
                hidden,
                inner=config.shared_intermediate_size,
                layout=layout,
                fmt=fmt,
                unit=config.mlp_unit,
            )

    def forward(
        self, x_TD: Tensor, x_q: Quantized | None = None, tokens: StepTokens | None = None
    ) -> Tensor:
        """Return this rank's part, [T, D] float32: its experts' and its share of the shared.

        Args:
            x_TD: hidden states of this dp group.
            x_q: x in FP8, if known.
            tokens: number of tokens of all dp groups, if known.
        """
        tokens = tokens or StepTokens()
        if not len(x_TD):  # an idle group's experts serve the others
            ids_TK = torch.zeros((0, self.top_k), dtype=torch.int64, device=x_TD.device)
            return self.dispatch(x_TD, ids_TK, ids_TK.float(), self.run_experts, tokens)()
        is_local = self.dispatch.mesh.layout.dp == 1
        shared = self._start_shared(x_TD, x_q) if is_local else None
        local = self.local if is_local and self.physical_experts is None else None
        ids_TK, weight_TK, groups = self.router(x_TD, tokens.position_T, local)
        if self.physical_experts is not None:
            ids_TK = self.physical_experts(ids_TK)
        if is_local:  # the tokens stay where they are, so x_q is theirs
            run = partial(self.run_experts, x_q=x_q, addend=shared, groups=groups)
            return self.dispatch(x_TD, ids_TK, weight_TK, run, tokens)()
        combine = self.dispatch(x_TD, ids_TK, weight_TK, self.run_experts, tokens)
        shared = self._start_shared(x_TD, x_q)
        return combine() if shared is None else combine().add_(shared())

    def _start_shared(self, x_TD: Tensor, x_q: Quantized | None) -> Callable[[], Tensor] | None:
        """Start the shared experts; return a function that returns their part, [T, D]."""
        if self.shared_experts is None:
            return None
        work = partial(self.shared_experts, x_TD, x_q)
        return self.side.start(work, len(x_TD) <= _OVERLAP_TOKENS)

    def run_experts(
        self,
        x_MD: Tensor,
        ids_MK: Tensor,
        weight_MK: Tensor,
        x_q: Quantized | None = None,
        addend: Callable[[], Tensor] | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """Return the sums over this rank's experts, [M, D] float32.

        Args:
            x_MD: hidden states.
            ids_MK: ids of physical experts; those of other ranks are skipped.
            weight_MK: their weights.
            x_q: x in FP8, if known.
            addend: returns [M, D] to be added to the sums.
            groups: `permute` of the ids, if known.
        """
        ue8m0 = self.gate_up_proj.ue8m0
        x: Tensor | Quantized = x_MD
        # Rows between the products are quantized as those before them.
        if self.gate_up_proj.quantizes and self.down_proj.quantizes:
            x = act_quant(x_MD, ue8m0) if x_q is None else x_q
        elif self._int8_products and takes_int8_rows(len(x_MD)):
            x = int8_quant(x_MD)
        return experts(
            x,
            ids_TK=ids_MK,
            weight_TK=weight_MK,
            first_expert=self.local.first,
            gate_up=self.gate_up_proj.stack(),
            down=self.down_proj.stack(),
            ue8m0=ue8m0,
            addend=addend,
            spread=self.spread,
            groups=groups,
        )


def feed_forward(
    config: ModelConfig,
    layer: int,
    prefix: str,
    layout: ParallelConfig,
    fmt: WeightFormat,
    dispatch: ExpertDispatch,
    side: SideStream,
) -> MLP | MoE:
    """Return the feed-forward part of decoder layer `layer`; the first layers are dense."""
    if config.is_moe_layer(layer):
        return MoE(config, prefix, layout, fmt, dispatch, side)
    return MLP(
        prefix,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layout=layout,
        fmt=fmt,
        unit=config.mlp_unit,
    )
