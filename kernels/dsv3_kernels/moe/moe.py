"""Routed experts: gate_up, silu * up, down, weighted sum over a token's experts.

The kernels are three to five launches, which do not depend on the choice of experts or on counts on
the host: `permute` (unless `route_and_permute` did it), two grouped products (in FP8 with a
quantization between them, fused into the first for many tokens), `unpermute`. The reference loops
over the experts with tokens.

Bound by reading the weights of experts with tokens, up to about 64 tokens per expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dsv3_kernels._cast import as_float32
from dsv3_kernels._gpu import row_bucket
from dsv3_kernels.gemm.act_quant import Quantized, dequantize
from dsv3_kernels.gemm.int8_quant import requantize
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack
from dsv3_kernels.moe.permute import Groups, LocalExperts, permute, unpermute
from dsv3_kernels.operation import operation
from dsv3_kernels.ops.silu_mul import silu_mul

# Rows that the reference computes for all experts together, in few calls; more rows are computed
# expert by expert, so that they stay in a processor's cache: 1 MiB of float32 at width 256.
_FEW_ROWS = 1024


@dataclass(frozen=True, slots=True)
class _Hit:
    """An expert with rows: its index on this rank, and the number of rows."""

    index: int
    count: int


def _grouped_linear(x_MD: Tensor, hit: list[_Hit], w: Stack) -> Tensor:
    """Return x W_e^T: the first rows belong to the first expert, and so on."""
    parts = x_MD.split_with_sizes([one.count for one in hit])
    products = [w.product(one.index, x) for x, one in zip(parts, hit, strict=True)]
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
        x: [T, D] hidden states, float or quantized. If in FP8, so are the products (both matrices
            are FP8, D and F multiples of 128) and the rows between them; if in int8, both matrices
            are int8 with a scale per row.
        ids_TK: [T, K] int64 global expert ids; -1 and ids of other ranks' experts are skipped.
        weight_TK: [T, K] float32.
        first_expert: global id of this rank's first expert.
        gate_up: [E, 2F, D] of the local experts: in the dtype of `x`, FP8 (then F is a multiple of
            128), or integers.
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
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    weight_N = weight_TK.flatten()
    # On the host, because a call of torch takes longer than sorting the entries of few tokens.
    id_N = ids_TK.flatten().cpu().numpy()
    # Entries of other ranks' experts are sorted to the front and to the back.
    order_N = id_N.argsort(kind="stable")
    first_ids = np.arange(first_expert, first_expert + len(down.weight) + 1)
    starts = id_N[order_N].searchsorted(first_ids).tolist()
    hit = [
        _Hit(e, stop - start) for e, (start, stop) in enumerate(pairwise(starts)) if start < stop
    ]
    is_few = 0 < starts[-1] - starts[0] <= _FEW_ROWS
    stop = starts[0]
    for some in [hit] if is_few else [[one] for one in hit]:
        start = stop
        stop = stop + sum(one.count for one in some)
        entries = order_N[start:stop]
        entry_M, row_M = (
            torch.from_numpy(index).to(x_TD.device)
            for index in (entries, entries // ids_TK.shape[1])
        )
        h_MF = silu_mul.reference(_grouped_linear(x_TD.index_select(0, row_M), some, gate_up))
        if isinstance(x, Quantized):
            h_MF = dequantize(requantize(h_MF, x, ue8m0))
        y_MD = as_float32(_grouped_linear(h_MF, some, down))
        y_TD.index_add_(0, row_M, y_MD.mul_(weight_N.index_select(0, entry_M).unsqueeze(1)))
    return y_TD if addend is None else y_TD.add_(addend())
