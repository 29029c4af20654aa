"""Sequence parallelism: in long steps each tp rank has only its share of the residual stream.

A sum over tp is then a reduce-scatter, each rank normalizes 1/tp of the rows, and the normalized
rows are gathered for the layer that needs them all. If sums are in the activations' dtype, this
sends as many bytes as an all-reduce; if they are in float32 (MoE), fewer, because the gather is in
the activations' dtype.
"""

from torch import Tensor
from torch.nn import functional as F

from dsv3.distributed.collectives import Collectives
from dsv3_kernels import NormedSum, add_rmsnorm


class SequenceParallel:
    """The rows of one step.

    Args:
        tp: the ranks of the group.
        count: tokens of the step, T.
        is_split: each rank has its share of S = ceil(T / tp) rows, padded on the last ranks; else
            each rank has all rows (S = T).
    """

    def __init__(self, tp: Collectives, count: int, is_split: bool) -> None:
        self.is_split = is_split
        self._tp = tp
        self._count = count
        self._share = -(-count // tp.size)

    def _padded(self, x_TD: Tensor) -> Tensor:
        return F.pad(x_TD, (0, 0, 0, self._share * self._tp.size - self._count))

    def own(self, x_TD: Tensor) -> Tensor:
        """Return this rank's rows, [S, D]."""
        if not self.is_split:
            return x_TD
        return self._padded(x_TD).chunk(self._tp.size)[self._tp.rank]

    def gather(self, x_SD: Tensor) -> Tensor:
        """Return all rows, [T, D]. A collective if they are split."""
        if not self.is_split:
            return x_SD
        return self._tp.all_gather(x_SD).flatten(0, 1)[: self._count]

    def sum_norm(
        self, x_SD: Tensor, y_TD: Tensor | None, w_D: Tensor, eps: float, quant: bool, ue8m0: bool
    ) -> NormedSum:
        """Add the sum of y over ranks to x, and normalize. A collective.

        Args:
            x_SD: this rank's rows of the residual stream.
            y_TD: this rank's part of the summand, all rows; None for zero.
            w_D: weight of the RMS norm.
            eps: of the norm.
            quant: return the normalized rows in FP8, too.
            ue8m0: scales are powers of two.

        Returns:
            The new x_SD, its normalized rows [T, D], and those in FP8. The latter are None without
            `quant`, and if rows are split: then the reading layer quantizes the gathered rows.
        """
        if not self.is_split:
            return self._tp.sum_norm(x_SD, y_TD, w_D, eps, quant, ue8m0)
        y_SD = None if y_TD is None else self._tp.reduce_scatter(self._padded(y_TD))
        x_SD, h_SD, _ = add_rmsnorm(x_SD, y_SD, w_D, eps)
        return NormedSum(x_SD, self.gather(h_SD), None)
