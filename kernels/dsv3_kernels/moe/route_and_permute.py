"""Routing and sorting of entries; for few tokens in one launch.

`route`, then `permute`, in the kernel of `route`: each token has a program, and the program that
ends last sorts the entries of all tokens, which it reads back from memory. With a single token, the
entries are sorted in the registers that hold them.

Bound by latency, of which a launch is a part.
"""

from torch import Tensor

from dsv3_kernels._gpu import row_bucket
from dsv3_kernels.moe.permute import Groups, LocalExperts, empty_groups, permute
from dsv3_kernels.moe.route import EntrySort, RouterInput, launch_route, route
from dsv3_kernels.operation import operation

# Entries that one warp sorts by comparing all pairs; not measured.
_FEW = 128


def _launch_route_and_permute(
    router: RouterInput, local: LocalExperts, locks: Tensor
) -> tuple[Tensor, Tensor, Groups | None]:
    """Launch one program per token; for many tokens launch `route` and `permute`."""
    T = router.logits_STE.shape[1]
    K = router.rule.num_experts_per_tok
    if not 0 < row_bucket(T) * K <= _FEW:
        ids_TK, weight_TK = route.kernel(router)
        return ids_TK, weight_TK, permute.kernel(ids_TK, local)
    groups = empty_groups((T, K), local.count, router.logits_STE.device)
    ids_TK, weight_TK = launch_route(router, EntrySort(local, groups, locks))
    return ids_TK, weight_TK, groups


@operation(kernel=_launch_route_and_permute)
def route_and_permute(
    router: RouterInput, local: LocalExperts, locks: Tensor
) -> tuple[Tensor, Tensor, Groups | None]:
    """Choose each token's experts and their weights, and sort the entries of the local experts.

    Args:
        router: as for `route`.
        local: experts of this rank.
        locks: `make_locks` of the router's weight; launches that share them must follow one
            another. Not used by the reference.

    Returns:
        ids_TK, weight_TK: as from `route`.
        groups: as from `permute`; None from the reference, since that of `experts` needs none.
    """
    ids_TK, weight_TK = route.reference(router)
    return ids_TK, weight_TK, None
