"""Expert routing: scores, group-limited top-k, weights. One small row per token.

Bound by latency: a program (one warp) holds a token's row in registers from logits to weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._gpu import next_power_of_2, row_bucket
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.moe.permute import Groups, LocalExperts, permute_last
from dsv3_kernels.operation import operation


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing rule of a model (field names of the HF config)."""

    scoring_func: str
    topk_method: str
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def is_grouped(self) -> bool:
        """True if the choice is limited to the best groups."""
        return self.topk_method != "greedy" and self.n_group > 1


@dataclass(frozen=True, slots=True)
class RouterInput:
    """The input of `route`.

    Attributes:
        logits_STE: [S, T, E] float32, contiguous; the router's logits are the sum over S.
        bias_E: [E] float32 `e_score_correction_bias`, or None.
        rule: the model's routing rule.
        position_T: [T] int64; -1 marks a padding row, which chooses no expert. None: no padding.
    """

    logits_STE: Tensor
    bias_E: Tensor | None
    rule: Routing
    position_T: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self.logits_STE.device


@dataclass(frozen=True, slots=True)
class EntrySort:
    """Sorting of the entries in the launch of `route`.

    Attributes:
        local: experts of this rank.
        groups: memory for the result.
        locks: counters of programs that have ended.
    """

    local: LocalExperts
    groups: Groups
    locks: Tensor


def _ranked(x: Tensor) -> Tensor:
    """Return the indices of each row's values, largest first; ties go to the lowest index."""
    return x.sort(dim=-1, descending=True, stable=True).indices


def _limit_to_groups(choice_TE: Tensor, rule: Routing) -> Tensor:
    """Set the experts outside the best `topk_group` groups to -inf.

    -inf, not 0: a biased score may be negative.
    """
    groups_TgE = choice_TE.view(choice_TE.shape[0], rule.n_group, -1)
    if rule.topk_method == "noaux_tc":
        group_score = groups_TgE.topk(min(2, groups_TgE.shape[-1]), dim=-1).values.sum(-1)
    else:
        group_score = groups_TgE.amax(-1)
    dropped = _ranked(group_score)[:, rule.topk_group :, None].expand(-1, -1, groups_TgE.shape[2])
    return groups_TgE.scatter(1, dropped, float("-inf")).flatten(1)


@triton.jit
def _order_key(x):
    """Return int32 keys in the order of x; that of -inf is above -2^31."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["positions", "T", "first_expert"])
def _route_kernel(
    logits,
    bias,
    positions,
    ids,
    weights,
    entries,
    rows,
    starts,
    counts,
    locks,
    scaling,
    T,
    first_expert,
    num_local,
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
    SIZE: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Route a token. If SIZE (the padded number of entries) is not 0, the last program sorts them.

    The candidate experts are in registers as [G_PAD, M_PAD]: groups, members.
    """
    in_turn()
    token = tl.program_id(0).to(tl.int64)
    MEMBERS: tl.constexpr = E // G
    LOWEST: tl.constexpr = -(1 << 31)
    PLACES: tl.constexpr = G_PAD * M_PAD
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
    # Keys of 32 bits, which a warp reduces in one instruction; of equals the first place is best.
    if TOPK_GROUP < G:
        value = tl.max(choice, 1)
        if BEST_TWO and MEMBERS > 1:
            order = _order_key(choice)
            is_best = order == tl.max(order, 1)[:, None]
            first = tl.min(tl.where(is_best, member[None, :], M_PAD), 1)
            value += tl.max(tl.where(member[None, :] == first[:, None], float("-inf"), choice), 1)
        key = tl.where(group < G, _order_key(value), LOWEST)
        kept = tl.zeros([G_PAD], tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            best = group == tl.min(tl.where(key == tl.max(key, 0), group, G_PAD), 0)
            kept = tl.where(best, 1, kept)
            key = tl.where(best, LOWEST, key)
        choice = tl.where(kept[:, None] > 0, choice, float("-inf"))
    place = tl.arange(0, PLACES)
    key = tl.reshape(tl.where(real, _order_key(choice), LOWEST), (PLACES,))
    bits = tl.reshape(score.to(tl.int32, bitcast=True), (PLACES,))
    k = tl.arange(0, K_PAD)
    chosen = tl.zeros([K_PAD], tl.int64)
    weight = tl.zeros([K_PAD], tl.float32)
    for i in tl.static_range(K):
        at = tl.min(tl.where(key == tl.max(key, 0), place, PLACES), 0)
        won = tl.sum(tl.where(place == at, bits, 0), 0).to(tl.float32, bitcast=True)
        chosen = tl.where(k == i, (at // M_PAD * MEMBERS + at % M_PAD).to(tl.int64), chosen)
        weight = tl.where(k == i, won, weight)
        key = tl.where(place == at, LOWEST, key)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    if PADDED:
        chosen = tl.where(tl.load(positions + token) < 0, -1, chosen)
    tl.store(ids + token * K + k, chosen, mask=k < K)
    tl.store(weights + token * K + k, weight * scaling, mask=k < K)
    permute_last(
        ids=ids,
        chosen=chosen,
        locks=locks,
        T=T,
        entries=entries,
        rows=rows,
        starts=starts,
        counts=counts,
        first_expert=first_expert,
        E=num_local,
        K=K,
        SIZE=SIZE,
        ALONE=ALONE,
    )


def launch_route(router: RouterInput, sort: EntrySort | None) -> tuple[Tensor, Tensor]:
    """Launch one program per token, which also sorts the entries if there is a `sort`."""
    S, T, E = router.logits_STE.shape
    rule = router.rule
    logits_STE = router.logits_STE
    bias_E = router.bias_E
    position_T = router.position_T
    K = rule.num_experts_per_tok
    num_groups = rule.n_group if rule.is_grouped else 1
    assert E <= 512 and min(16, E) >= K and E % num_groups == 0, f"{E=} {K=} {num_groups=}"
    assert logits_STE.dtype == torch.float32 and logits_STE.is_contiguous()
    ids_TK = torch.empty((T, K), dtype=torch.int64, device=logits_STE.device)
    weight_TK = torch.empty((T, K), dtype=torch.float32, device=logits_STE.device)
    if T:
        _route_kernel[(T,)](
            logits=logits_STE,
            bias=logits_STE if bias_E is None else bias_E,
            positions=logits_STE if position_T is None else position_T,
            ids=ids_TK,
            weights=weight_TK,
            entries=ids_TK if sort is None else sort.groups.entry_M,
            rows=ids_TK if sort is None else sort.groups.row_TK,
            starts=ids_TK if sort is None else sort.groups.start_E,
            counts=ids_TK if sort is None else sort.groups.count_E,
            locks=ids_TK if sort is None else sort.locks,
            scaling=rule.routed_scaling_factor,
            T=T,
            first_expert=0 if sort is None else sort.local.first,
            num_local=0 if sort is None else sort.local.count,
            S=S,
            E=E,
            G=num_groups,
            TOPK_GROUP=rule.topk_group if rule.is_grouped else num_groups,
            K=K,
            SOFTMAX=rule.scoring_func == "softmax",
            BIASED=bias_E is not None,
            PADDED=position_T is not None,
            BEST_TWO=rule.topk_method == "noaux_tc",
            NORMALIZE=rule.norm_topk_prob,
            G_PAD=next_power_of_2(num_groups),
            M_PAD=next_power_of_2(E // num_groups),
            K_PAD=next_power_of_2(K),
            SIZE=0 if sort is None else next_power_of_2(row_bucket(T) * K),
            ALONE=T == 1,
            num_warps=1,
            **launch_options(),
        )
    return ids_TK, weight_TK


def _launch_route(router: RouterInput) -> tuple[Tensor, Tensor]:
    return launch_route(router, None)


@operation(kernel=_launch_route)
def route(router: RouterInput) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their weights.

    scores = sigmoid or softmax of the logits; the choice is by score + bias, limited to the best
    groups (a group's score: the sum of its two best for noaux_tc, its best for
    group_limited_greedy); the weights are the chosen scores, normalized if the model does so,
    times routed_scaling_factor. Ties go to the lowest id, of groups as of experts.

    Returns:
        ids_TK: [T, K] int64 expert ids, the best choice first; -1 for none.
        weight_TK: [T, K] float32.

    Source: DeepSeek-V2 paper 2.2.2 (softmax forms), DeepSeek-V3 report eq. 12-16 (noaux_tc).
    """
    rule = router.rule
    logits_STE = router.logits_STE
    logits = logits_STE[0] if len(logits_STE) == 1 else logits_STE.sum(0)
    score_TE = logits.softmax(-1) if rule.scoring_func == "softmax" else logits.sigmoid()
    choice_TE = score_TE if router.bias_E is None else score_TE + router.bias_E
    if rule.is_grouped:
        choice_TE = _limit_to_groups(choice_TE, rule)
    ids_TK = _ranked(choice_TE)[:, : rule.num_experts_per_tok]
    # The weights are the unbiased scores; never recovered as (biased - bias), which cancels.
    weight_TK = score_TE.gather(1, ids_TK)
    if rule.norm_topk_prob:
        weight_TK.div_(weight_TK.sum(-1, keepdim=True).add_(1e-20))
    if router.position_T is not None:
        ids_TK = ids_TK.masked_fill(router.position_T[:, None] < 0, -1)
    return ids_TK, weight_TK.mul_(rule.routed_scaling_factor)
