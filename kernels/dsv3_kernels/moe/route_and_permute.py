"""The choice of experts and the order of their rows: for few tokens in one launch.

`route`, then `permute`, by the kernel of `route`: a token has a program, and the one that ends last
sorts the entries of all, which it reads back from memory. One token's are sorted in the registers
that hold them.

Bound by latency, a part of which is that of a launch.
"""

from torch import Tensor

from dsv3_kernels._triton import triton, use_triton
from dsv3_kernels.moe.permute import Groups, empty_groups, permute_ref, permute_triton
from dsv3_kernels.moe.route import Routing, launch_route, route_ref, route_triton

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
    start_E, count_E, entry_M, slot_TK = empty_groups((T, K), num_local, logits_STE.device)
    where = entry_M, slot_TK, start_E, count_E, locks, first_expert, num_local
    sort = *where, triton.next_power_of_2(T * K)
    ids_TK, weight_TK = launch_route(logits_STE, bias_E, r, position_T, sort)
    return ids_TK, weight_TK, Groups(start_E, count_E, entry_M, slot_TK)


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
