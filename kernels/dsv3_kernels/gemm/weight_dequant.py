"""Dequantization of block-scaled FP8 weights. Bound by bytes."""

import torch
from torch import Tensor

from dsv3_kernels._cast import as_float32
from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import decode_e4m3, e4m3_floats, e4m3_view, is_native
from dsv3_kernels.operation import operation

# Rows and columns of a program.
_ROWS = 16
_COLUMNS = 128
# Values of a matrix that the reference decodes at a time: they stay in a processor's cache.
_VALUES = 1 << 18


def _expand(scale: Tensor, dim: int, size: int, offset: int, block: int) -> Tensor:
    """Repeat each block scale over the `size` values it covers, the first `offset` cut away."""
    return scale.repeat_interleave(block, dim).narrow(dim, offset, size)


@triton.jit(do_not_specialize=["rows", "scale_rows", "row_offset"])
def _weight_dequant_kernel(
    w_ptr,
    scale_ptr,
    out_ptr,
    rows,
    cols,
    scale_rows,
    scale_cols,
    row_offset,
    col_offset,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Dequantize R rows and C columns of one of the stacked matrices."""
    in_turn()
    e = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R).to(tl.int64)[:, None]
    col = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (col < cols)
    at = (e * rows + row) * cols + col
    if NATIVE:
        w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        w = decode_e4m3(tl.load(w_ptr + at, mask=mask, other=0))
    scale_row = (row + row_offset) // BLOCK_R
    scale_col = (col + col_offset) // BLOCK_C
    scale_at = (e * scale_rows + scale_row) * scale_cols + scale_col
    scale = tl.load(scale_ptr + scale_at, mask=mask, other=0.0)
    tl.store(out_ptr + at, (w * scale).to(out_ptr.dtype.element_ty), mask=mask)


def _launch_weight_dequant(
    w_FD: Tensor,
    scale_fd: Tensor,
    dtype: torch.dtype,
    row_offset: int = 0,
    col_offset: int = 0,
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> Tensor:
    rows, cols = w_FD.shape[-2:]
    scale_rows, scale_cols = scale_fd.shape[-2:]
    assert scale_rows * block[0] >= row_offset + rows, f"{w_FD.shape=} {scale_fd.shape=}"
    assert scale_cols * block[1] >= col_offset + cols, f"{w_FD.shape=} {scale_fd.shape=}"
    out = torch.empty(w_FD.shape, dtype=dtype, device=w_FD.device)
    if out.numel():
        stacked = out.numel() // (rows * cols)
        grid = (cdiv(rows, _ROWS), cdiv(cols, _COLUMNS), stacked)
        _weight_dequant_kernel[grid](
            w_ptr=e4m3_view(w_FD.contiguous()),
            scale_ptr=scale_fd.float().contiguous(),
            out_ptr=out,
            rows=rows,
            cols=cols,
            scale_rows=scale_rows,
            scale_cols=scale_cols,
            row_offset=row_offset,
            col_offset=col_offset,
            BLOCK_R=block[0],
            BLOCK_C=block[1],
            R=_ROWS,
            C=_COLUMNS,
            NATIVE=is_native(w_FD),
            **launch_options(),
        )
    return out


@operation(kernel=_launch_weight_dequant)
def weight_dequant(
    w_FD: Tensor,
    scale_fd: Tensor,
    dtype: torch.dtype,
    row_offset: int = 0,
    col_offset: int = 0,
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> Tensor:
    """Return w * scale of its block.

    Args:
        w_FD: [..., F, D] float8_e4m3fn; any rectangle cut out of a block-scaled weight.
        scale_fd: [..., f, d] float32, the blocks that cover the rectangle. (Checkpoints call it
            `weight_scale_inv`; it is a multiplier.)
        dtype: of the result.
        row_offset: rows of the first block row that lie before the rectangle, below block[0].
        col_offset: the same for columns.
        block: rows and columns of a block.

    Returns:
        [..., F, D] in `dtype`.

    Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md.
    """
    rows, cols = w_FD.shape[-2:]
    scale_Fd = _expand(as_float32(scale_fd), -2, rows, row_offset, block[0])
    out_FD = torch.empty(w_FD.shape, dtype=dtype, device=w_FD.device)
    step = max(1, _VALUES // max(1, cols))
    for first in range(0, rows, step):
        part = ..., slice(first, first + step), slice(None)
        w = e4m3_floats(w_FD[part])
        scale = scale_Fd[part]
        if col_offset or cols % block[1]:
            w.mul_(_expand(scale, -1, cols, col_offset, block[1]))
        elif w.numel():  # whole blocks need no scale of every value
            blocks = w.unflatten(-1, (-1, block[1]))
            blocks.mul_(scale.narrow(-1, 0, blocks.shape[-2]).unsqueeze(-1))
        out_FD[part] = w
    return out_FD
