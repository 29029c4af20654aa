"""Tiles of the experts' products inside kernels: their number, position and multiplication.

Tiles of few rows are W x^T, tiles of many rows x W^T; `grouped_gemm` explains why. The constants
FP8, BITS, QUANTIZED and NATIVE say which numbers are multiplied; see `grouped_gemm.Numbers`.
"""

from dsv3_kernels._triton import tl, triton
from dsv3_kernels.gemm._e4m3 import decode_e4m3, e4m3_operand
from dsv3_kernels.gemm._int_product import int_product


@triton.jit
def row_tiles(counts, E, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, TILES_N: tl.constexpr):
    """Return the number of tiles of each expert, [E_PAD]."""
    e = tl.arange(0, E_PAD)
    count = tl.load(counts + e, mask=e < E, other=0)
    return (count + BLOCK_M - 1) // BLOCK_M * TILES_N


@triton.jit
def place(tile, tiles_E, counts, starts, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return a tile's expert, its block of features, its rows, and a mask of existing rows.

    Tiles of one block of features are neighbours: the matrix is read once, then found in L2.
    """
    end_E = tl.cumsum(tiles_E, 0)
    e = tl.sum((end_E <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, E_PAD) < e, tiles_E, 0), 0)
    count = tl.load(counts + e)
    across = (count + BLOCK_M - 1) // BLOCK_M
    row = (tile - before) % across * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < count
    start = tl.load(starts + e).to(tl.int64)
    # Rows beyond the last repeat it: nothing outside the expert's rows is read.
    return e.to(tl.int64), (tile - before) // across, start + tl.minimum(row, count - 1), real


@triton.jit
def scales_of(N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """Return the number of scales of a matrix: of its blocks, or if GROUP > 0 of its groups."""
    if GROUP > 0:
        return N * (D // GROUP)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return (N + 127) // 128 * ((D + 127) // 128)


@triton.jit
def _accumulate(
    acc,
    x,
    w,
    w_scale,
    row_scale,
    FP8: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NATIVE: tl.constexpr,
    SWAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the product of a step along D: [features, rows] if SWAPPED, else [rows, features].

    Sums of int8 (int32 in `acc`) are exact, so their scales come later (`_scale_sums`).
    """
    if FP8 and QUANTIZED:
        w = e4m3_operand(w, NATIVE)
        x = e4m3_operand(x, NATIVE)
        if SWAPPED:
            acc += tl.dot(w, x) * (w_scale * row_scale[None, :])
        else:
            acc += tl.dot(x, w) * (w_scale * row_scale[:, None])
    elif QUANTIZED:
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    else:
        if FP8:
            w = w.to(tl.float32) if NATIVE else decode_e4m3(w)
            w = (w * w_scale).to(x.dtype)
        if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _load_tile(pointers, inside, across, WHOLE: tl.constexpr):
    """Load a block whose first dimension is bounded by `inside`, the other by `across`."""
    if WHOLE:
        return tl.load(pointers)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return tl.load(pointers, mask=inside & across, other=0.0)


@triton.jit
def _load_matrix(
    w,
    row,
    first,
    present,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load [BLOCK_K, BLOCK_N]: `present` rows of W from `row`, transposed, from column `first`."""
    if TMA:
        return tl.trans(w.load([row.to(tl.int32), first]))
    else:  # noqa: RET505
        n = tl.arange(0, BLOCK_N)[None, :]
        k = first + tl.arange(0, BLOCK_K)[:, None]
        return tl.load(w + row * D + n * D + k, mask=(n < present) & (k < D), other=0.0)


@triton.jit
def multiply_few(
    x,
    x_scale,
    w,
    w_scale,
    rows,
    low,
    N: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NATIVE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return x W^T, [rows, features], for few rows: operands swapped.

    Features are low.. of N; if GATED, the features of gate and then the same of up, in one
    product, since a matrix unit takes at least 64.
    """
    FEATURES: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    d: tl.constexpr = (D + 127) // 128
    i = tl.arange(0, FEATURES)
    is_up = (i >= BLOCK_N)[:, None]
    present = (low + i % BLOCK_N < N)[:, None]
    feature = (low + i % BLOCK_N)[:, None] + tl.where(is_up, N, 0)
    k = tl.arange(0, BLOCK_K)
    w_at = w + feature.to(tl.int64) * D + k[None, :]
    x_at = x + rows[None, :] * D + k[:, None]
    acc = tl.zeros([FEATURES, BLOCK_M], tl.float32)
    for first in range(0, D, BLOCK_K):
        inside = k < D - first
        x_tile = _load_tile(x_at, inside[:, None], True, EVEN_D)
        w_tile = _load_tile(w_at, inside[None, :], present, EVEN_D and N % BLOCK_N == 0)
        scale = 1.0
        row_scale = rows
        if FP8:
            at = w_scale + first // 128
            scale = tl.load(at + low // 128 * d)
            if GATED:
                scale = tl.where(is_up, tl.load(at + (N + low) // 128 * d), scale)
        if QUANTIZED:
            row_scale = tl.load(x_scale + rows * d + first // 128)
        acc = _accumulate(
            acc=acc,
            x=x_tile,
            w=w_tile,
            w_scale=scale,
            row_scale=row_scale,
            FP8=FP8,
            QUANTIZED=QUANTIZED,
            NATIVE=NATIVE,
            SWAPPED=True,
            INTERPRETED=INTERPRETED,
        )
        w_at += BLOCK_K
        x_at += BLOCK_K
    return tl.trans(acc)


@triton.jit
def multiply_many(
    x,
    x_scale,
    w,
    w_scale,
    rows,
    first_row,
    low,
    N: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NATIVE: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return x W^T of features low.. of N, and if GATED also of N + low.., both [rows, features].

    With TMA `w` is a descriptor of tiles, else a pointer; the expert begins at row `first_row`.
    """
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    SUMS: tl.constexpr = tl.int32 if QUANTIZED and not FP8 else tl.float32
    d: tl.constexpr = (D + 127) // 128
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None] * D + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    up = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    for first in range(0, D, BLOCK_K):
        x_tile = _load_tile(x_at, (k < D - first)[None, :], True, EVEN_D)
        x_at += BLOCK_K
        row_scale = rows
        if FP8 and QUANTIZED:
            row_scale = tl.load(x_scale + rows * d + first // 128)
        at = w_scale + first // 128
        scale = tl.load(at + low // 128 * d) if FP8 else 1.0
        w_tile = _load_matrix(
            w=w,
            row=first_row + low,
            first=first,
            present=N - low,
            D=D,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            TMA=TMA,
        )
        acc = _accumulate(
            acc=acc,
            x=x_tile,
            w=w_tile,
            w_scale=scale,
            row_scale=row_scale,
            FP8=FP8,
            QUANTIZED=QUANTIZED,
            NATIVE=NATIVE,
            SWAPPED=False,
            INTERPRETED=INTERPRETED,
        )
        if GATED:
            scale = tl.load(at + (N + low) // 128 * d) if FP8 else 1.0
            w_tile = _load_matrix(
                w=w,
                row=first_row + N + low,
                first=first,
                present=N - low,
                D=D,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                TMA=TMA,
            )
            up = _accumulate(
                acc=up,
                x=x_tile,
                w=w_tile,
                w_scale=scale,
                row_scale=row_scale,
                FP8=FP8,
                QUANTIZED=QUANTIZED,
                NATIVE=NATIVE,
                SWAPPED=False,
                INTERPRETED=INTERPRETED,
            )
    if QUANTIZED and not FP8:
        row_scale = tl.load(x_scale + rows)
        acc = _scale_sums(acc, row_scale, w_scale, low, N, BLOCK_N)
        up = _scale_sums(up, row_scale, w_scale + N, low, N, BLOCK_N) if GATED else up
    return acc, up


@triton.jit
def _scale_sums(acc, row_scale, w_scale, low, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return int32 sums times the scales of their row and feature, in float32."""
    feature = low + tl.arange(0, BLOCK_N)
    scale = tl.load(w_scale + feature, mask=feature < N, other=0.0).to(tl.float32)
    return acc.to(tl.float32) * row_scale[:, None] * scale[None, :]


@triton.jit
def multiply_integers(
    x,
    w,
    w_scale,
    w_zero,
    rows,
    low,
    N: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return x W^T, [rows, features], of float rows and a matrix of integers: operands swapped.

    If GATED, the features of gate and then the same of up, as in `multiply_few`. Features beyond
    the last repeat it.
    """
    FEATURES: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    i = tl.arange(0, FEATURES)
    feature = tl.minimum(low + i % BLOCK_N, N - 1) + tl.where(i >= BLOCK_N, N, 0)
    acc = int_product(
        x_ptr=x,
        w_ptr=w,
        scale_ptr=w_scale,
        zero_ptr=w_zero,
        x_row=rows,
        w_row=feature.to(tl.int64),
        first=0,
        last=(D + BLOCK_K - 1) // BLOCK_K,
        K=D,
        x_stride=D,
        group=GROUP,
        BITS=BITS,
        ZEROS=ZEROS,
        BM=BLOCK_M,
        BN=FEATURES,
        BK=BLOCK_K,
        EVEN=D % BLOCK_K == 0,
        INTERPRETED=INTERPRETED,
        STAGES=STAGES,
    )
    return tl.trans(acc)
