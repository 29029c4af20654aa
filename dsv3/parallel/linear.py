"""Column-, row- and vocabulary-parallel layers.

Column: output features are split, no exchange. Row: input features are split, the partial products
are summed over tp. Vocabulary: rows of the embedding or the head are split; ids outside a rank's
range contribute zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.config import ParallelConfig, split_range
from dsv3.distributed.collectives import Collectives
from dsv3.parallel.module import Module
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix
from dsv3_kernels import Quantized, make_locks


class Linear(Matrix):
    """y = x W^T with W packed from the named parts; each rank computes with its own slice of W.

    Args:
        prefix: checkpoint name of the owning layer, with its final dot.
        parts: projection name -> rows on this rank.
        in_features: columns on this rank.
        fmt: dtype and device.
        row_offset, col_offset, quantized, must_be_finite, by_rows: see `Matrix`.
    """

    def __init__(
        self,
        prefix: str,
        parts: dict[str, int],
        in_features: int,
        fmt: WeightFormat,
        *,
        row_offset: int = 0,
        col_offset: int = 0,
        quantized: bool = True,
        must_be_finite: bool = False,
        by_rows: bool = False,
    ) -> None:
        super().__init__(
            [[f"{prefix}{part}.weight" for part in parts]],
            list(parts.values()),
            in_features,
            fmt,
            row_offset=row_offset,
            col_offset=col_offset,
            quantized=quantized,
            must_be_finite=must_be_finite,
            by_rows=by_rows,
        )
        self.locks = make_locks(self.weight[0])

    def forward(self, x_TD: Tensor | Quantized, x_q: Quantized | None = None) -> Tensor:
        """Return [T, sum of rows].

        Args:
            x_TD: activations; may be in FP8 alone if `quantizes`.
            x_q: x in FP8, if known.
        """
        return self.multiply(x_q if self.quantizes and x_q is not None else x_TD, self.locks)


class ColumnParallelLinear(Linear):
    """`Linear` with rows split over tp.

    Args:
        prefix: checkpoint name of the owning layer, with its final dot.
        parts: projection name -> rows on all ranks, the same for all parts.
        in_features: columns.
        layout: parallel sizes and this rank's coordinates.
        fmt: dtype and device.
        unit: rows are split in multiples of this.
        quantized, must_be_finite, by_rows: see `Matrix`.
    """

    def __init__(
        self,
        prefix: str,
        parts: dict[str, int],
        in_features: int,
        layout: ParallelConfig,
        fmt: WeightFormat,
        unit: int = 1,
        *,
        quantized: bool = True,
        must_be_finite: bool = False,
        by_rows: bool = False,
    ) -> None:
        bounds = {
            part: split_range(size, layout.tp, layout.tp_rank, unit) for part, size in parts.items()
        }
        assert len({start for start, _ in bounds.values()}) == 1, "parts of one size"
        super().__init__(
            prefix,
            {part: stop - start for part, (start, stop) in bounds.items()},
            in_features,
            fmt,
            row_offset=next(iter(bounds.values()))[0],
            quantized=quantized,
            must_be_finite=must_be_finite,
            by_rows=by_rows,
        )


class RowParallelLinear(Linear):
    """`Linear` with input features split over tp, in multiples of `unit`.

    `forward` returns this rank's partial product; the caller sums it over tp, together with other
    partial results (one all-reduce instead of two).
    """

    def __init__(
        self,
        prefix: str,
        part: str,
        out_features: int,
        in_features: int,
        layout: ParallelConfig,
        fmt: WeightFormat,
        unit: int = 1,
    ) -> None:
        start, stop = split_range(in_features, layout.tp, layout.tp_rank, unit)
        super().__init__(prefix, {part: out_features}, stop - start, fmt, col_offset=start)


class VocabParallelEmbedding(Module):
    """Embedding rows split over tp."""

    def __init__(
        self,
        name: str,
        vocab: int,
        dim: int,
        layout: ParallelConfig,
        tp: Collectives,
        fmt: WeightFormat,
    ) -> None:
        super().__init__()
        self.start, stop = split_range(vocab, layout.tp, layout.tp_rank)
        self.rows = stop - self.start
        self.table = Matrix([[name]], [self.rows], dim, fmt, quantized=False, by_rows=True)
        self.tp = tp

    def forward(self, ids_T: Tensor) -> Tensor:
        """Return [T, D], the same on every rank."""
        if self.tp.size == 1:
            return F.embedding(ids_T, self.table.matrix())
        local_T = ids_T - self.start
        outside = (local_T < 0) | (local_T >= self.rows)
        if self.rows == 0:
            x_TD = self.table.weight.new_zeros(ids_T.shape[0], self.table.weight.shape[-1])
        else:
            x_TD = F.embedding(local_T.masked_fill(outside, 0), self.table.matrix())
            x_TD = x_TD.masked_fill(outside[:, None], 0.0)
        return self.tp.all_reduce(x_TD)


class VocabParallelHead(Module):
    """LM head: this rank's columns of the logits.

    Every rank returns the same number of columns; if tp does not divide the vocabulary size, the
    last columns are -inf.
    """

    def __init__(
        self, name: str, vocab: int, dim: int, layout: ParallelConfig, fmt: WeightFormat
    ) -> None:
        super().__init__()
        self.start, stop = split_range(vocab, layout.tp, layout.tp_rank)
        self.width = -(-vocab // layout.tp)
        self.table = Matrix([[name]], [stop - self.start], dim, fmt, quantized=False)
        self.locks = make_locks(self.table.weight[0])

    def forward(self, x_MD: Tensor) -> Tensor:
        """Return [M, ceil(W / tp)] float32 logits of ids start, start + 1, ..."""
        logits = self.table.multiply(x_MD, self.locks, torch.float32)
        missing = self.width - logits.shape[1]
        if missing:
            logits = F.pad(logits, (0, missing), value=float("-inf"))
        return logits
