"""Block-scaled FP8 weights back to a float dtype."""

import torch
from torch import Tensor

BLOCK = 128


def _expand(scale: Tensor, dim: int, size: int, offset: int, block: int) -> Tensor:
    """Repeat each block scale over the `size` values it covers, the first `offset` cut away."""
    return scale.repeat_interleave(block, dim).narrow(dim, offset, size)


def weight_dequant_ref(
    w_FD: Tensor,
    scale_fd: Tensor,
    dtype: torch.dtype,
    row_offset: int = 0,
    col_offset: int = 0,
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> Tensor:
    """Define `weight_dequant`."""
    rows, cols = w_FD.shape[-2:]
    by_row = _expand(scale_fd.float(), -2, rows, row_offset, block[0])
    return (w_FD.float() * _expand(by_row, -1, cols, col_offset, block[1])).to(dtype)


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
        scale_fd: [..., f, d] float32, the blocks that cover the rectangle. (The checkpoints call
            it `weight_scale_inv`; it is a multiplier.)
        dtype: of the result.
        row_offset: rows of the first block row that lie before the rectangle, below block[0].
        col_offset: the same for columns.
        block: rows and columns of a block.

    Returns:
        [..., F, D] in `dtype`.

    Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md.
    """
    return weight_dequant_ref(w_FD, scale_fd, dtype, row_offset, col_offset, block)
