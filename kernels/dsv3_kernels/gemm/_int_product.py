"""Products with matrices of integers inside kernels: y^T = W x^T, with W made float in registers.

A step along K lies within a group, so the integers (exact in bfloat16) are multiplied first and a
step's sums are scaled in float32. W is the first operand, for any number of rows of x: matrix units
then take it from registers. A byte of int4 has two neighbouring columns: the low halves are
multiplied by the even columns of x, the high halves by the odd ones.
"""

from dsv3_kernels._triton import tl, triton
from dsv3_kernels.gemm.bf16_gemm import load_step


def step_of(group: int, cols: int, itemsize: int) -> int:
    """Return the columns of a step along K: 128 bytes of x, or as many as lie within a group.

    Args:
        group: columns that share a scale: all, or a multiple of 32.
        cols: of the matrix.
        itemsize: bytes of an element of x.
    """
    assert group >= cols or group % 32 == 0, f"{group=} {cols=}"
    step = 128 // itemsize
    return step if group >= cols or group % step == 0 else 32


@triton.jit
def _step_product(w, x, zero, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return (W - zero) x^T of a step: w [N, bytes], x [M, K], zero [N, 1] or a number."""
    if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
        x = x.to(tl.float32)
    if BITS == 8:
        return tl.dot(w.to(x.dtype), tl.trans(x), input_precision="ieee")
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        low = ((w & 15).to(tl.float32) - zero).to(x.dtype)
        high = ((w >> 4).to(tl.float32) - zero).to(x.dtype)
        sums = tl.dot(low, tl.trans(even), input_precision="ieee")
        return tl.dot(high, tl.trans(odd), sums, input_precision="ieee")


@triton.jit
def int_product(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    x_row,
    w_row,
    first,
    last,
    K,
    x_stride,
    group,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return W x^T, [BN, BM] float32, over the steps first .. last of BK columns.

    `w_row` [BN] and `x_row` [BM] are int64 and exist; `EVEN` says that BK divides K. Without ZEROS
    the zero of int4 is 8, and `zero_ptr` is not read.
    """
    BYTES: tl.constexpr = BK * BITS // 8
    row_bytes = K * BITS // 8
    x_at = x_ptr + x_row[:, None] * x_stride + tl.arange(0, BK)[None, :]
    w_at = w_ptr + w_row[:, None] * row_bytes + tl.arange(0, BYTES)[None, :]
    of_row = w_row * (K // group)
    acc = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(first, last, num_stages=STAGES):
        x = load_step(x_at + b * BK, K - b * BK, EVEN)
        w = load_step(w_at + b * BYTES, row_bytes - b * BYTES, EVEN)
        of_group = of_row + b * BK // group
        zero = 8.0
        if ZEROS:
            zero = tl.load(zero_ptr + of_group).to(tl.float32)[:, None]
        scale = tl.load(scale_ptr + of_group).to(tl.float32)
        acc += _step_product(w, x, zero, BITS, INTERPRETED) * scale[:, None]
    return acc
