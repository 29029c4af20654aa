"""Routed experts: gate_up, silu * up, down, weighted sum over a token's experts.

The kernels are three to five launches, which do not depend on the choice of experts or on counts on
the host: `permute` (unless `route_and_permute` did it), two grouped products (in FP8 with a
quantization between them, fused into the first for many tokens), `unpermute`. The reference loops
over the experts with tokens.

Bound by reading the weights of experts with tokens, up to about 64 tokens per expert.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, row_bucket
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
_SUM = 0  # mode of `torch.embedding_bag`


class _Expert(NamedTuple):
    """An expert with rows: its number on this rank, and its rows."""

    number: int
    start: int
    stop: int


class _SortedRows(NamedTuple):
    """The entries of local experts, sorted by expert; other entries share one row after them.

    Sorted on the host, because a call of torch takes longer than sorting the entries of few tokens.

    Attributes:
        token_M: [M] int64 token of each row.
        row_N: [T * K] int64 row of each entry, M for those of other ranks' experts.
        start_T: [T] int64 first entry of each token.
        experts: those with rows, in order.
    """

    token_M: Tensor
    row_N: Tensor
    start_T: Tensor
    experts: list[_Expert]

    @classmethod
    def of(cls, ids_TK: Tensor, first_expert: int, num_experts: int) -> "_SortedRows":
        """Sort entries."""
        T, K = ids_TK.shape
        id_N = ids_TK.flatten().cpu().numpy()
        # Entries of other ranks' experts are sorted to the front and to the back.
        order_N = id_N.argsort(kind="stable")
        first_ids = np.arange(first_expert, first_expert + num_experts + 1)
        edges = id_N[order_N].searchsorted(first_ids)
        entry_M = order_N[edges[0] : edges[-1]]
        row_of_entry = np.full(T * K, len(entry_M))
        row_of_entry[entry_M] = np.arange(len(entry_M))
        bounds = pairwise((edges - edges[0]).tolist())
        experts = [
            _Expert(e, start, stop) for e, (start, stop) in enumerate(bounds) if start < stop
        ]
        token_M, row_N, start_T = (
            torch.as_tensor(index, device=ids_TK.device)
            for index in (entry_M // K, row_of_entry, np.arange(0, T * K, K))
        )
        return cls(token_M, row_N, start_T, experts)


def _multiply(x_MD: Tensor, experts: list[_Expert], w: Stack, out_MF: Tensor) -> None:
    """Write x W_e^T of the rows of these experts."""
    first = experts[0].start
    for number, start, stop in experts:
        rows = slice(start - first, stop - first)
        w.multiply(number, x_MD[rows], out_MF[rows])


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
    """Launch the kernels; weighted rows have the dtype of `x`, or bfloat16 if it is quantized."""
    local = LocalExperts(first_expert, len(gate_up.weight))
    if isinstance(x, Tensor):
        x = x.contiguous()  # rows of a received buffer may be strided
    if groups is None:
        groups = permute.kernel(ids_TK.contiguous(), local)
    T, K = ids_TK.shape
    rows = cdiv(row_bucket(T) * K, local.count * spread)
    dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
    h = grouped_gate_up.kernel(x, gate_up, groups, rows, ue8m0)
    y_MD = grouped_down.kernel(h, down, groups, rows, dtype, weight_TK)
    addend_TD = None if addend is None else addend()
    return unpermute.kernel(y_MD, groups.row_TK, addend_TD)


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
    token_M, row_N, start_T, hit = _SortedRows.of(ids_TK, first_expert, len(down.weight))
    num_rows = token_M.numel()
    y_MD = x_TD.new_empty((num_rows + 1, x_TD.shape[1]), dtype=torch.float32)
    if num_rows < row_N.numel():
        y_MD[num_rows] = 0.0
    for some in [hit] if 0 < num_rows <= _FEW_ROWS else [[one] for one in hit]:
        rows = slice(some[0].start, some[-1].stop)
        x_MD = x_TD.index_select(0, token_M[rows])
        gate_up_MF = x_MD.new_empty((len(x_MD), gate_up.num_features))
        _multiply(x_MD, some, gate_up, gate_up_MF)
        h_MF = silu_mul.reference(gate_up_MF)
        if isinstance(x, Quantized):
            h_MF = dequantize(requantize(h_MF, x, ue8m0))
        _multiply(h_MF, some, down, y_MD[rows])
    weight_N = weight_TK.flatten()
    y_TD = torch.embedding_bag(y_MD, row_N, start_T, mode=_SUM, per_sample_weights=weight_N)[0]
    return y_TD if addend is None else y_TD.add_(addend())
