"""Writing rows to cache slots. Bound by bytes: every row is read and written once."""

from typing import NamedTuple

from torch import Tensor

from dsv3_kernels._cast import as_dtype
from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.operation import operation

_BLOCK = 4096  # bytes per program


@triton.jit
def _write_slots_kernel(
    cache_SY, slot_T, row_TY, stride_s, stride_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_T + t).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(slot >= 0, WIDTH, 0)
    row = tl.load(row_TY + t * stride_t + at, mask=mask, other=0)
    tl.store(cache_SY + slot * stride_s + at, row.to(cache_SY.dtype.element_ty), mask=mask)


def _launch_write_slots(cache_SY: Tensor, slot_T: Tensor, row_TY: Tensor) -> None:
    """Launch one program per row and block of its values."""
    assert cache_SY.stride(1) == row_TY.stride(1) == 1, f"{cache_SY.stride()}, {row_TY.stride()}"
    T, width = row_TY.shape
    block = min(_BLOCK // cache_SY.element_size(), next_power_of_2(width))
    if T:
        _write_slots_kernel[(T, cdiv(width, block))](
            cache_SY=cache_SY,
            slot_T=slot_T,
            row_TY=row_TY,
            stride_s=cache_SY.stride(0),
            stride_t=row_TY.stride(0),
            WIDTH=width,
            BLOCK=block,
            **launch_options(),
        )


class StoredRows(NamedTuple):
    """The rows that have a slot.

    Attributes:
        row_N: [N] int64 rows; None for all.
        slot_N: [N] int64 their slots.
    """

    row_N: Tensor | None
    slot_N: Tensor

    @classmethod
    def of(cls, slot_T: Tensor) -> "StoredRows":
        """Return the rows with a slot other than -1."""
        row_N = (slot_T >= 0).nonzero()[:, 0]
        if len(row_N) == len(slot_T):
            return cls(None, slot_T)
        return cls(row_N, slot_T[row_N])

    def copy_to(self, cache_SY: Tensor, row_TY: Tensor) -> None:
        """Store rows, cast to the cache's dtype, in their slots."""
        if self.row_N is not None:
            row_TY = row_TY.index_select(0, self.row_N)
        cache_SY.index_copy_(0, self.slot_N, as_dtype(row_TY, cache_SY.dtype))


@operation(kernel=_launch_write_slots)
def write_slots(cache_SY: Tensor, slot_T: Tensor, row_TY: Tensor) -> None:
    """Store row t in slot slot_T[t], cast to the cache's dtype; skip rows with slot -1.

    Args:
        cache_SY: [slots, Y], written in place.
        slot_T: [T] int64, distinct except for -1.
        row_TY: [T, Y].
    """
    StoredRows.of(slot_T).copy_to(cache_SY, row_TY)
