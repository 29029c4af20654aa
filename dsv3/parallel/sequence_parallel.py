"""Which rows of the residual stream a tp rank holds: all of them, or its share in long steps.

A sum over tp is then a reduce-scatter, norms see 1/tp of the rows, and the normalized rows are
gathered where a layer needs them all. It sends what an all-reduce sends where sums are in the
activations' dtype, and less where they are in float32 (MoE): the gather is in the activations'.
"""

from torch import Tensor
from torch.nn import functional as F

from dsv3.distributed.collectives import Collectives
from dsv3_kernels import Quantized, add_rmsnorm


class SequenceParallel:
    """The rows of one step.

    Args:
        tp: the ranks of the group.
        count: tokens of the step.
        is_split: whether each rank holds its share only, equal ones; the last is filled up.
    """

    def __init__(self, tp: Collectives, count: int, is_split: bool) -> None:
        self._tp, self._count, self.is_split = tp, count, is_split
        self._share = -(-count // tp.size)

    def _filled(self, x_TD: Tensor) -> Tensor:
        return F.pad(x_TD, (0, 0, 0, self._share * self._tp.size - self._count))

    def own(self, x_TD: Tensor) -> Tensor:
        """Return this rank's rows of all."""
        return self._filled(x_TD).chunk(self._tp.size)[self._tp.rank] if self.is_split else x_TD

    def gather(self, x_SD: Tensor) -> Tensor:
        """Return all rows. A collective if they are split."""
        return self._tp.all_gather(x_SD).flatten(0, 1)[: self._count] if self.is_split else x_SD

    def sum_norm(
        self, x_SD: Tensor, y_TD: Tensor | None, w_D: Tensor, eps: float, quant: bool, ue8m0: bool
    ) -> tuple[Tensor, Tensor, Quantized | None]:
        """Add the sum of y over ranks to x; return that, all rows of its norm, and those in FP8.

        Rows that are gathered are quantized after that, where they are read. A collective.
        """
        if not self.is_split:
            return self._tp.sum_norm(x_SD, y_TD, w_D, eps, quant, ue8m0)
        y_SD = None if y_TD is None else self._tp.reduce_scatter(self._filled(y_TD))
        x_SD, h_SD, _ = add_rmsnorm(x_SD, y_SD, w_D, eps)
        return x_SD, self.gather(h_SD), None
