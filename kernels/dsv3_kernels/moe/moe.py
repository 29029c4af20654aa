"""Routed experts: gate_up, silu * up, down, weighted sum over a token's experts.

The kernels are three to five launches, which do not depend on the choice of experts or on counts on
the host: `permute` (unless `route_and_permute` did it), two grouped products (in FP8 with a
quantization between them, fused into the first for many tokens), `unpermute`. The reference loops
over the experts with tokens.

Bound by reading the weights of experts with tokens, up to about 64 tokens per expert.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._cast import as_float32
from dsv3_kernels._gpu import row_bucket
from dsv3_kernels.gemm.act_quant import Quantized, act_quant, dequantize
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack
from dsv3_kernels.moe.permute import Groups, LocalExperts, permute, unpermute
from dsv3_kernels.operation import operation
from dsv3_kernels.ops.silu_mul import silu_mul

# Rows that the reference computes for all experts together, in few calls; more rows are computed
# expert by expert, so that they stay in a processor's cache: 1 MiB of float32 at width 256.
_FEW_ROWS = 1024


def _grouped_linear(x_MD: Tensor, counts: list[int], w: Stack, first: int) -> Tensor:
    """Return x W_e^T: the first counts[0] rows belong to expert `first`, and so on."""
    products = [
        F.linear(x, w.matrix(e, x.dtype))
        for e, x in enumerate(x_MD.split_with_sizes(counts), first)
        if x.shape[0]
    ]
    return products[0] if len(products) == 1 else torch.cat(products)


def _launch_experts(
    x: Tensor | Quantized,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    gate_up: Stack,
    down: Stack,
    ue8m0: bool = False,
    addend: Callable[[], Tensor] | None = None,
    spread: int = 1,
    groups: Groups | None = None,
) -> Tensor:
    """Launch the kernels; weighted rows are held in the dtype of `x`, or in bfloat16."""
    local = LocalExperts(first_expert, len(gate_up.weight))
    if isinstance(x, Tensor):
        x = x.contiguous()  # rows of a received buffer may be strided
    if groups is None:
        groups = permute.kernel(ids_TK.contiguous(), local)
    assert groups.row_TK is not None
    T, K = ids_TK.shape
    rows = -(-row_bucket(T) * K // (local.count * spread))
    dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
    h = grouped_gate_up.kernel(x, gate_up, groups, rows, ue8m0)
    y_MD = grouped_down.kernel(h, down, groups, rows, dtype, weight_TK)
    addend_TD = None if addend is None else addend()
    return unpermute.kernel(y_MD, groups.row_TK, None, addend_TD)


@operation(kernel=_launch_experts)
def experts(
    x: Tensor | Quantized,
    ids_TK: Tensor,
    weight_TK: Tensor,
    first_expert: int,
    gate_up: Stack,
    down: Stack,
    ue8m0: bool = False,
    addend: Callable[[], Tensor] | None = None,
    spread: int = 1,
    groups: Groups | None = None,
) -> Tensor:
    """Return this rank's part of sum_k weight_k * expert_k(x).

    Args:
        x: [T, D] hidden states, float or quantized 1x128. If quantized, the products are in FP8
            (both matrices are FP8, D and F multiples of 128), and so are the rows between them.
        ids_TK: [T, K] int64 global expert ids; -1 and ids of other ranks' experts are skipped.
        weight_TK: [T, K] float32.
        first_expert: global id of this rank's first expert.
        gate_up: [E, 2F, D] of the local experts, in the dtype of `x` or FP8 (then F is a multiple
            of 128).
        down: [E, D, F].
        ue8m0: round the scales of activations up to powers of two.
        addend: returns [T, D], any float dtype, to be added. Called last, so the tensor may be
            computed on another stream.
        spread: number of ranks that `ids_TK` are spread over; affects only the speed. Not used by
            the reference.
        groups: `permute` of `ids_TK`, if known: saves a launch. Not used by the reference.

    Returns:
        [T, D] float32; the sum over ranks is the layer's output.
    """
    x_TD = dequantize(x)
    T, K = ids_TK.shape
    # On the host, because a call of torch takes longer than sorting the entries of few tokens.
    id_M = ids_TK.flatten().cpu().numpy()
    # Entries of other ranks' experts are sorted to the front and to the back.
    order_M = id_M.argsort(kind="stable")
    expert_E = np.arange(gate_up.weight.shape[0] + 1) + first_expert
    starts = id_M[order_M].searchsorted(expert_E).tolist()
    counts = [stop - start for start, stop in pairwise(starts)]
    num_rows = sum(counts)
    # The experts' results in the order of the entries, 0 for other ranks' experts.
    new = x_TD.new_empty if num_rows == T * K else x_TD.new_zeros
    y_TKD = new((T, K, down.weight.shape[1]), dtype=torch.float32)
    step = len(counts) if num_rows <= _FEW_ROWS else 1
    for e in range(0, len(counts), step):
        if starts[e] == starts[e + step]:
            continue
        entry_M = torch.from_numpy(order_M[starts[e] : starts[e + step]]).to(x_TD.device)
        x_MD = x_TD.index_select(0, entry_M // K)
        h_MF = silu_mul.reference(_grouped_linear(x_MD, counts[e : e + step], gate_up, e))
        if isinstance(x, Quantized):
            h_MF = dequantize(act_quant.reference(h_MF, ue8m0))
        y_MD = _grouped_linear(h_MF, counts[e : e + step], down, e)
        y_TKD.flatten(0, 1).index_copy_(0, entry_M, as_float32(y_MD))
    y_TD = torch.bmm(weight_TK[:, None], y_TKD)[:, 0]
    return y_TD if addend is None else y_TD.add_(addend())
