"""Expert routing: scores, group-limited top-k, weights. One small row per token.

Bound by latency: a program (one warp) holds a token's row in registers from logits to weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.moe.permute import permute_last


@dataclass(frozen=True, slots=True)
class Routing:
    """How a model chooses experts (field names of the HF config)."""

    scoring_func: str
    topk_method: str
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def is_grouped(self) -> bool:
        """Whether the choice is limited to the best groups."""
        return self.topk_method != "greedy" and self.n_group > 1


def _largest(x: Tensor, k: int) -> Tensor:
    """Return where the k largest of each row are, best first, ties to the lowest index."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _limit_to_groups(choice_TE: Tensor, r: Routing) -> Tensor:
    """Set the experts outside the best `topk_group` groups to -inf.

    -inf, not 0: a biased score may be negative.
    """
    groups_TgE = choice_TE.view(choice_TE.shape[0], r.n_group, -1)
    if r.topk_method == "noaux_tc":
        group_score = groups_TgE.topk(min(2, groups_TgE.shape[-1]), dim=-1).values.sum(-1)
    else:
        group_score = groups_TgE.amax(-1)
    kept = _largest(group_score, r.topk_group)
    dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
    return groups_TgE.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def route_ref(
    logits_STE: Tensor, bias_E: Tensor | None, r: Routing, position_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Define `route`."""
    logits = logits_STE[0] if len(logits_STE) == 1 else logits_STE.sum(0)
    score_TE = logits.softmax(-1) if r.scoring_func == "softmax" else logits.sigmoid()
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if r.is_grouped:
        choice_TE = _limit_to_groups(choice_TE, r)
    ids_TK = _largest(choice_TE, r.num_experts_per_tok)
    # The weights are the unbiased scores; never recovered as (biased - bias), which cancels.
    weight_TK = score_TE.gather(1, ids_TK)
    if r.norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    if position_T is not None:
        ids_TK = ids_TK.masked_fill(position_T[:, None] < 0, -1)
    return ids_TK, weight_TK * r.routed_scaling_factor


@triton.jit
def _rank_key(x, index):
    """Return int64 keys, all different, in the order of x; of equal ones the lowest index leads."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit(do_not_specialize=["positions", "T", "first_expert"])
def _route_kernel(
    logits,
    bias,
    positions,
    ids,
    weights,
    scaling,
    T,
    S: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    PADDED: tl.constexpr,
    BEST_TWO: tl.constexpr,
    NORMALIZE: tl.constexpr,
    G_PAD: tl.constexpr,
    M_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    entries,
    slots,
    starts,
    counts,
    locks,
    first_expert,
    held,
    SIZE: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Route a token; with a SIZE, that of all entries filled up, the last program sorts them.

    The experts to choose from lie in registers as [G_PAD, M_PAD]: groups, members.
    """
    in_turn()
    token = tl.program_id(0).to(tl.int64)
    MEMBERS: tl.constexpr = E // G
    LOWEST: tl.constexpr = -(1 << 63)
    group = tl.arange(0, G_PAD)
    member = tl.arange(0, M_PAD)
    expert = group[:, None] * MEMBERS + member[None, :]
    real = (group[:, None] < G) & (member[None, :] < MEMBERS)
    x = tl.zeros([G_PAD, M_PAD], tl.float32)
    for part in tl.static_range(S):
        at = logits + (part * T + token) * E + expert
        x += tl.load(at, mask=real, other=float("-inf"))
    if SOFTMAX:
        score = tl.exp(x - tl.max(tl.max(x, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-x))
    choice = score
    if BIASED:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    position = group[:, None] * M_PAD + member[None, :]
    if TOPK_GROUP < G:
        value = tl.max(choice, 1)
        if BEST_TWO and MEMBERS > 1:
            order = _rank_key(choice, position)
            first = order == tl.max(order, 1)[:, None]
            value += tl.max(tl.where(first, float("-inf"), choice), 1)
        key = tl.where(group < G, _rank_key(value, group), LOWEST)
        kept = tl.zeros([G_PAD], tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            best = key == tl.max(key, 0)
            kept = tl.where(best, 1, kept)
            key = tl.where(best, LOWEST, key)
        choice = tl.where(kept[:, None] > 0, choice, float("-inf"))
    key = tl.where(real, _rank_key(choice, position), LOWEST)
    k = tl.arange(0, K_PAD)
    chosen = tl.zeros([K_PAD], tl.int64)
    weight = tl.zeros([K_PAD], tl.float32)
    for i in tl.static_range(K):
        best = key == tl.max(tl.max(key, 1), 0)
        chosen = tl.where(k == i, tl.sum(tl.sum(tl.where(best, expert, 0), 1), 0), chosen)
        weight = tl.where(k == i, tl.sum(tl.sum(tl.where(best, score, 0.0), 1), 0), weight)
        key = tl.where(best, LOWEST, key)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    if PADDED:
        chosen = tl.where(tl.load(positions + token) < 0, -1, chosen)
    tl.store(ids + token * K + k, chosen, mask=k < K)
    tl.store(weights + token * K + k, weight * scaling, mask=k < K)
    into = (entries, slots, starts, counts, first_expert, held)
    permute_last(ids, chosen, locks, T, *into, K, SIZE, ALONE)


def launch_route(
    logits_STE: Tensor,
    bias_E: Tensor | None,
    r: Routing,
    position_T: Tensor | None,
    sort: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch one program per token; `sort` is what the kernel takes from `entries` to `SIZE`."""
    S, T, E = logits_STE.shape
    K, G = r.num_experts_per_tok, r.n_group if r.is_grouped else 1
    assert E <= 512 and min(16, E) >= K and E % G == 0, f"{E=} {K=} {G=}"
    assert logits_STE.dtype == torch.float32 and logits_STE.is_contiguous()
    ids_TK = torch.empty((T, K), dtype=torch.int64, device=logits_STE.device)
    weight_TK = torch.empty((T, K), dtype=torch.float32, device=logits_STE.device)
    if T:
        _route_kernel[(T,)](
            logits_STE,
            logits_STE if bias_E is None else bias_E,
            logits_STE if position_T is None else position_T,
            ids_TK,
            weight_TK,
            *(r.routed_scaling_factor, T, S, E, G, r.topk_group if r.is_grouped else G, K),
            *(r.scoring_func == "softmax", bias_E is not None, position_T is not None),
            *(r.topk_method == "noaux_tc", r.norm_topk_prob),
            *(triton.next_power_of_2(n) for n in (G, E // G, K)),
            *(sort or (*5 * [ids_TK], 0, 0, 0)),
            ALONE=T == 1,
            num_warps=1,
            **launch_options(),
        )
    return ids_TK, weight_TK


def route_triton(
    logits_STE: Tensor, bias_E: Tensor | None, r: Routing, position_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `route`."""
    return launch_route(logits_STE, bias_E, r, position_T)


def route(
    logits_STE: Tensor, bias_E: Tensor | None, r: Routing, position_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their weights.

    scores = sigmoid or softmax of the logits; the choice is by score + bias, limited to the best
    groups (a group's score: the sum of its two best for noaux_tc, its best for
    group_limited_greedy); the weights are the chosen scores, normalized where the model does so,
    times routed_scaling_factor. Ties go to the lowest id, of groups as of experts.

    Args:
        logits_STE: [S, T, E] float32, contiguous; the router's logits are the sum over S.
        bias_E: [E] float32 `e_score_correction_bias`, or None.
        r: the model's routing rule.
        position_T: [T] int64; a row at -1 fills the batch up and chooses nothing. None: no such.

    Returns:
        ids_TK: [T, K] int64 expert ids, the best choice first; -1 for none.
        weight_TK: [T, K] float32.

    Source: DeepSeek-V2 paper 2.2.2 (softmax forms), DeepSeek-V3 report eq. 12-16 (noaux_tc).
    """
    if use_triton(logits_STE):
        return route_triton(logits_STE, bias_E, r, position_T)
    return route_ref(logits_STE, bias_E, r, position_T)
