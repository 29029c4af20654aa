"""The choice of experts and the order of their rows: for few tokens in one launch.

`route`, then `permute`. Each token has a program; the one that ends last sorts the entries of all,
which it reads back from memory. One token's are sorted in the registers that hold them.

Bound by latency, a part of which is that of a launch.
"""

from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton
from dsv3_kernels.permute import Groups, empty_groups, permute_few, permute_ref, permute_triton
from dsv3_kernels.route import Routing, route_operands, route_ref, route_token, route_triton

# Entries that one warp sorts by comparing each with each; not measured.
_FEW = 128


def route_and_permute_ref(
    logits_STE: Tensor,
    bias_E: Tensor | None,
    r: Routing,
    position_T: Tensor | None,
    first_expert: int,
    num_local: int,
) -> tuple[Tensor, Tensor, Groups]:
    """Define `route_and_permute`."""
    ids_TK, weight_TK = route_ref(logits_STE, bias_E, r, position_T)
    return ids_TK, weight_TK, permute_ref(ids_TK, first_expert, num_local)


@triton.jit(do_not_specialize=["first_expert", "positions", "T"])
def _route_and_permute_kernel(
    starts,
    counts,
    entries,
    slots,
    locks,
    first_expert,
    held,
    SIZE: tl.constexpr,
    ALONE: tl.constexpr,
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
):
    """Route a token; the last program to do so sorts all entries, SIZE when filled up."""
    in_turn()
    token = tl.program_id(0).to(tl.int64)
    # fmt: off
    chosen = route_token(
        token, logits, bias, positions, ids, weights, scaling, T,
        S, E, G, TOPK_GROUP, K, SOFTMAX, BIASED, PADDED, BEST_TWO, NORMALIZE, G_PAD, M_PAD, K_PAD,
    )
    # fmt: on
    into = (entries, slots, starts, counts, first_expert, held)
    if ALONE:
        permute_few(chosen, *into, K, SIZE=K_PAD)
    else:
        # All threads' stores come before the count, the count before the loads.
        tl.debug_barrier()
        if tl.atomic_add(locks, 1, sem="acq_rel") == T - 1:
            entry = tl.arange(0, SIZE)
            every = tl.load(ids + entry, mask=entry < T * K, other=-1, cache_modifier=".cg")
            permute_few(every, *into, T * K, SIZE=SIZE)
            tl.store(locks, 0)  # as the next launch expects it


def route_and_permute_triton(
    logits_STE: Tensor,
    bias_E: Tensor | None,
    r: Routing,
    position_T: Tensor | None,
    first_expert: int,
    num_local: int,
    locks: Tensor,
) -> tuple[Tensor, Tensor, Groups]:
    """Launch one program per token; for many tokens launch `route` and `permute`."""
    T, K = logits_STE.shape[1], r.num_experts_per_tok
    if not 0 < T * K <= _FEW:
        ids_TK, weight_TK = route_triton(logits_STE, bias_E, r, position_T)
        return ids_TK, weight_TK, permute_triton(ids_TK, first_expert, num_local)
    operands, ids_TK, weight_TK = route_operands(logits_STE, bias_E, r, position_T)
    groups = empty_groups(ids_TK, num_local)
    size = triton.next_power_of_2(T * K)
    _route_and_permute_kernel[(T,)](
        *(*groups, locks, first_expert, num_local, size, T == 1),
        *operands,
        num_warps=1,
        **launch_options(),
    )
    return ids_TK, weight_TK, Groups(*groups)


def route_and_permute(
    logits_STE: Tensor,
    bias_E: Tensor | None,
    r: Routing,
    position_T: Tensor | None,
    first_expert: int,
    num_local: int,
    locks: Tensor,
) -> tuple[Tensor, Tensor, Groups | None]:
    """Choose each token's experts and their weights, and sort the entries of the local experts.

    Args:
        logits_STE: [S, T, E]; this and what follows as `route` takes it.
        bias_E: [E] float32, or None.
        r: the model's routing rule.
        position_T: [T] int64, or None.
        first_expert: id of the first local expert.
        num_local: local experts.
        locks: `make_locks` of the router's weight; launches that share them must follow one
            another.

    Returns:
        ids_TK, weight_TK: as `route` does.
        groups: as `permute` does; None on a CPU, where `experts` needs none.
    """
    if use_triton(logits_STE):
        held = first_expert, num_local, locks
        return route_and_permute_triton(logits_STE, bias_E, r, position_T, *held)
    return *route_ref(logits_STE, bias_E, r, position_T), None
