"""Writing rows to cache slots. Bound by bytes: every row is read and written once."""

from torch import Tensor

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


@operation(kernel=_launch_write_slots)
def write_slots(cache_SY: Tensor, slot_T: Tensor, row_TY: Tensor) -> None:
    """Store row t in slot slot_T[t], cast to the cache's dtype; skip rows with slot -1.

    Args:
        cache_SY: [slots, Y], written in place.
        slot_T: [T] int64, distinct except for -1.
        row_TY: [T, Y].
    """
    if len(slot_T) and slot_T.min().item() < 0:
        is_own = slot_T >= 0
        slot_T = slot_T[is_own]
        row_TY = row_TY[is_own]
    cache_SY.index_copy_(0, slot_T, row_TY.to(cache_SY.dtype))
