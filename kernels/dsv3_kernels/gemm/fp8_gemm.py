"""Products of FP8 activations and FP8 weights, both scaled in blocks: 1x128 and 128x128.

    y[m, n] = sum over blocks b of K of sx[m, b] * sw[n // 128, b] * (sum over b of x * w)

Tensor cores of Hopper keep about 14 bits inside an FP8 product, so every 128 of K is summed there
and added, scaled, to a float32 accumulator outside.

Two kernels. **Few rows** (`_small_kernel`; decode): bound by reading the weights, which `_split_k`
distributes over programs. **Many rows** (`_large_kernel`; prefill): bound by FLOPs. Persistent
programs visit the tiles in an order that keeps operands in L2; on Hopper tiles are loaded through
TMA descriptors.

`int8_gemm` launches the second one with integers.

Within a kernel a row's result depends neither on the number of rows nor on the tile: every element
is the same chain of additions, block after block. Between the two kernels only the order differs
(few rows: split by split, then the splits), so results agree to float32 rounding, not bit by bit.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._gpu import cdiv, row_bucket
from dsv3_kernels._triton import has_large_tma, in_turn, launch_gpu, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_operand, e4m3_view, is_native
from dsv3_kernels.gemm._split_k import ROWS, WANTED, SplitK, store_split
from dsv3_kernels.gemm.act_quant import Quantized, dequantize
from dsv3_kernels.gemm.weight_dequant import weight_dequant
from dsv3_kernels.operation import operation


def is_small(M: int, N: int) -> bool:
    """Return True if M rows use the small kernel: there are few rows, or y is small."""
    return M <= 128 or M * N <= 2**18


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of y in the large kernel.

    Attributes:
        BM: rows.
        BN: columns: 128, 192 or 256. One product of 128 columns, and possibly one of 64 or 128.
        num_warps, stages: of the launch.
        per_sm: programs per multiprocessor.
        speed: relative to the largest tile, with all multiprocessors busy; an estimate from the
            bytes read, unmeasured.
    """

    BM: int
    BN: int
    num_warps: int
    stages: int
    per_sm: int
    speed: float

    def seconds(self, M: int, N: int) -> float:
        """Return the time of a product, in arbitrary units: rounds of tiles times a tile's time."""
        tiles = cdiv(M, self.BM) * cdiv(N, self.BN)
        return cdiv(tiles, WANTED) * self.BM * self.BN / self.speed


# Two products of 128 x 128 at a time read L2 least (255 registers, none spilled in the loop). Tiles
# of 192 columns fit published matrices: 2112, 3072 and 4608 columns are 11, 16 and 24 times 192.
# Smaller tiles waste less of the last round.
TILES = (
    Tile(BM=128, BN=256, num_warps=8, stages=4, per_sm=1, speed=1.0),
    Tile(BM=128, BN=192, num_warps=8, stages=5, per_sm=1, speed=0.95),
    Tile(BM=128, BN=128, num_warps=8, stages=4, per_sm=1, speed=0.85),
    Tile(BM=64, BN=128, num_warps=4, stages=4, per_sm=2, speed=0.7),
)
# Without Hopper's tensor cores operands take registers too.
OLD_TILES = (
    Tile(BM=128, BN=128, num_warps=8, stages=3, per_sm=1, speed=1.0),
    Tile(BM=64, BN=128, num_warps=8, stages=3, per_sm=1, speed=0.8),
)


@cache
def tile_of(M: int, N: int, tiles: tuple[Tile, ...] = TILES) -> Tile:
    """Return the tile with the least expected time."""
    return min(tiles, key=lambda tile: tile.seconds(M, N))


@triton.jit(do_not_specialize=["M"])
def _small_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    LOCKED: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply BN rows of W by BM rows of x over one split of K."""
    in_turn()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m_tile = tl.program_id(2)
    blocks = K // 128
    n = tile * BN + tl.arange(0, BN)
    m = m_tile * BM + tl.arange(0, BM)
    k = tl.arange(0, 128)
    # Rows beyond the end repeat the last one; their results are not stored.
    n_row = tl.minimum(n, N - 1).to(tl.int64)
    m_row = tl.minimum(m, M - 1).to(tl.int64)
    w_at = w_ptr + n_row[:, None] * K + k[None, :]
    x_at = x_ptr + m_row[:, None] * K + k[None, :]
    w_scale_at = w_scale_ptr + (tile * BN // 128) * blocks
    x_scale_at = x_scale_ptr + m_row * blocks
    acc = tl.zeros((BN, BM), tl.float32)
    first = split * blocks // SPLITS
    last = (split + 1) * blocks // SPLITS
    for b in tl.range(first, last, num_stages=STAGES):
        w = e4m3_operand(tl.load(w_at + b * 128), NATIVE)
        x = e4m3_operand(tl.load(x_at + b * 128), NATIVE)
        scale = tl.load(x_scale_at + b) * tl.load(w_scale_at + b)
        acc += tl.dot(w, tl.trans(x)) * scale[None, :]
    store_split(
        y=tl.trans(acc),
        y_ptr=y_ptr,
        part_ptr=part_ptr,
        lock_ptr=lock_ptr,
        m=m,
        n=n,
        M=M,
        N=N,
        BM=BM,
        BN=BN,
        SPLITS=SPLITS,
        LOCKED=LOCKED,
    )


@triton.jit
def _load_tile(source, row, col, rows, K, B: tl.constexpr, TMA: tl.constexpr):
    """Load B rows of 128 from a descriptor or from a pointer to rows of K."""
    if TMA:
        return source.load([row, col])
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        r = tl.minimum(row + tl.arange(0, B), rows - 1).to(tl.int64)
        return tl.load(source + r[:, None] * K + col + tl.arange(0, 128)[None, :])


@triton.jit
def _store_tile(y_ptr, acc, row, col, M, N, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    # Inside a tile 32 bits are enough, and take half of the registers.
    start = y_ptr + row.to(tl.int64) * N + col
    mask = (m < M - row)[:, None] & (n < N - col)[None, :]
    tl.store(start + m[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns(n_tile, OTHER: tl.constexpr):
    """Return the first columns of the two products of a tile.

    Neither product crosses a block of 128 with a scale of its own: if the second is half as wide,
    two tiles share three blocks, and each takes half of the middle one.
    """
    if OTHER == 64:
        start = n_tile // 2 * 384
        odd = n_tile % 2
        return start + odd * 256, start + 128 + odd * 64
    else:  # noqa: RET505
        return n_tile * (128 + OTHER), n_tile * (128 + OTHER) + 128


@triton.jit
def _add_step(acc, a, c, x_scale, w_scale_at, NATIVE: tl.constexpr):
    """Add a c^T of a step: of int8 to exact sums, of FP8 times the scales of its block."""
    if acc.dtype == tl.int32:
        return tl.dot(a, tl.trans(c), acc, out_dtype=tl.int32)  # Triton 3.6 does not infer it
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        scale = x_scale * tl.load(w_scale_at)
        product = tl.dot(e4m3_operand(a, NATIVE), tl.trans(e4m3_operand(c, NATIVE)))
        return acc + product * scale[:, None]


@triton.jit
def _scale_sums(acc, row_scale, w_scale_ptr, col, N):
    """Return exact sums of int8 times the scales of their row and column, in float32."""
    n = tl.minimum(col + tl.arange(0, acc.shape[1]), N - 1)
    scale = tl.load(w_scale_ptr + n).to(tl.float32)
    return acc.to(tl.float32) * row_scale[:, None] * scale[None, :]


@triton.jit(do_not_specialize=["M"])
def _large_kernel(
    x,
    x_scale_ptr,
    w,
    w_other,
    w_scale_ptr,
    y_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    OTHER: tl.constexpr,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
    TMA: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute tiles of BM x (128 + OTHER).

    `x`, `w` and `w_other` (W again) are pointers or, with TMA, descriptors of tiles of BM, 128 and
    OTHER rows. They hold e4m3 with scales of blocks or, if INT8, integers with a scale per row.
    """
    in_turn()
    WIDTH: tl.constexpr = OTHER if OTHER > 0 else 64
    SUMS: tl.constexpr = tl.int32 if INT8 else tl.float32
    blocks = K // 128
    scales = 1 if INT8 else blocks
    m_tiles = tl.cdiv(M, BM)
    n_tiles = tl.cdiv(N, 128 + OTHER)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        # GROUP tiles of rows visit all columns together, so that they share W in L2.
        group = tile // (GROUP * n_tiles)
        height = tl.minimum(m_tiles - group * GROUP, GROUP)
        inside = tile - group * GROUP * n_tiles
        row = (group * GROUP + inside % height) * BM
        col, other_col = _columns(inside // height, OTHER)
        x_scale_at = x_scale_ptr + row.to(tl.int64) * scales
        x_scale_row = tl.minimum(tl.arange(0, BM), M - row - 1) * scales
        # A product beyond the last row of W reads the scales of the last block.
        w_scale_at = w_scale_ptr + tl.minimum(col, N - 1) // 128 * blocks
        other_at = w_scale_ptr + tl.minimum(other_col, N - 1) // 128 * blocks
        acc = tl.zeros((BM, 128), SUMS)
        other = tl.zeros((BM, WIDTH), SUMS)
        for b in tl.range(0, blocks, num_stages=STAGES):
            x_scale = 1.0 if INT8 else tl.load(x_scale_at + x_scale_row + b)
            a = _load_tile(x, row, b * 128, M, K, BM, TMA)
            c = _load_tile(w, col, b * 128, N, K, 128, TMA)
            acc = _add_step(acc, a, c, x_scale, w_scale_at + b, NATIVE)
            if OTHER > 0:
                c = _load_tile(w_other, other_col, b * 128, N, K, OTHER, TMA)
                other = _add_step(other, a, c, x_scale, other_at + b, NATIVE)
        if INT8:
            x_scale = tl.load(x_scale_at + x_scale_row)
            acc = _scale_sums(acc, x_scale, w_scale_ptr, col, N)
            other = _scale_sums(other, x_scale, w_scale_ptr, other_col, N)
        _store_tile(y_ptr, acc, row, col, M, N, BM, 128)
        if OTHER > 0:
            _store_tile(y_ptr, other, row, other_col, M, N, BM, OTHER)


def _launch_small(
    x: Quantized, w_FD: Tensor, scale_fd: Tensor, y: Tensor, locks: Tensor | None
) -> None:
    M, N = y.shape
    K = w_FD.shape[1]
    native = is_native(y)  # else decoded operands take registers, too
    split = SplitK.of(y, K // BLOCK, 128 if native else 64, locks)
    _small_kernel[split.grid(M, N)](
        x_ptr=e4m3_view(x.q),
        x_scale_ptr=x.scale,
        w_ptr=e4m3_view(w_FD),
        w_scale_ptr=scale_fd,
        y_ptr=y,
        part_ptr=split.part,
        lock_ptr=split.locks,
        M=M,
        N=N,
        K=K,
        BM=split.rows,
        BN=ROWS,
        SPLITS=split.splits,
        LOCKED=split.locked,
        NATIVE=native,
        STAGES=split.stages(y),
        num_warps=4,
        **launch_options(),
    )
    split.finish(y)


def launch_large(
    x: Quantized, w_FD: Tensor, scale_fd: Tensor, y: Tensor, tile: Tile, tma: bool
) -> None:
    """Launch persistent programs.

    Args:
        x: [M, D], FP8, or int8 with a scale per row.
        w_FD: [F, D] of the same format, D a multiple of 128.
        scale_fd: of blocks of W; of int8, of rows.
        y: [M, F], the result.
        tile: of the result.
        tma: load tiles through descriptors.
    """
    M, N = y.shape
    K = w_FD.shape[1]
    programs = launch_gpu(y).multiprocessors * tile.per_sm
    tiles = cdiv(M, tile.BM) * cdiv(N, tile.BN)
    other = tile.BN - 128
    _large_kernel[(min(tiles, programs),)](
        x=_tiles_of(x.q, tile.BM, tma),
        x_scale_ptr=x.scale,
        w=_tiles_of(w_FD, 128, tma),
        w_other=_tiles_of(w_FD, other or 128, tma),
        w_scale_ptr=scale_fd,
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        BM=tile.BM,
        OTHER=other,
        GROUP=8,
        INT8=w_FD.dtype == torch.int8,
        TMA=tma,
        NATIVE=is_native(y),
        STAGES=tile.stages,
        num_warps=tile.num_warps,
        **launch_options(),
    )


def multiply_many_rows(x: Quantized, w_FD: Tensor, scale_fd: Tensor, y: Tensor) -> None:
    """Launch persistent programs with the tile for these rows; see `launch_large`."""
    tma = has_large_tma(y)
    tile = tile_of(row_bucket(len(y)), y.shape[1], TILES if tma else OLD_TILES)
    launch_large(x, w_FD, scale_fd, y, tile, tma)


def _tiles_of(matrix: Tensor, rows: int, tma: bool) -> Any:
    """Return a descriptor of tiles of `rows` x 128, or the matrix itself."""
    view = matrix if matrix.dtype == torch.int8 else e4m3_view(matrix)
    if not tma:
        return view
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(view, [rows, BLOCK])


def _launch_fp8_gemm(
    x: Quantized,
    w_FD: Tensor,
    scale_fd: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    locks: Tensor | None = None,
) -> Tensor:
    N, K = w_FD.shape
    assert K % BLOCK == 0 and x.q.shape[-1] == K, f"{x.q.shape=} {w_FD.shape=}"
    assert scale_fd.shape == (cdiv(N, BLOCK), K // BLOCK), f"{w_FD.shape=} {scale_fd.shape=}"
    for t in (x.q, x.scale, w_FD, scale_fd):
        assert t.is_contiguous(), f"{t.shape=} {t.stride()=}"
    y = torch.empty((*x.q.shape[:-1], N), dtype=dtype, device=w_FD.device)
    flat = Quantized(x.q.view(-1, K), x.scale.view(-1, K // BLOCK))
    if not y.numel():
        return y
    rows = row_bucket(len(flat.q))
    if is_small(rows, N):
        _launch_small(flat, w_FD, scale_fd, y.view(-1, N), locks)
    else:
        multiply_many_rows(flat, w_FD, scale_fd, y.view(-1, N))
    return y


@operation(kernel=_launch_fp8_gemm)
def fp8_gemm(
    x: Quantized,
    w_FD: Tensor,
    scale_fd: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    locks: Tensor | None = None,
) -> Tensor:
    """Return x W^T of FP8 values with block scales, summed in float32 and rounded once.

    Args:
        x: [..., D] with a scale per 128, D a multiple of 128.
        w_FD: [F, D] float8_e4m3fn, contiguous; F may end inside a block.
        scale_fd: [ceil(F / 128), D / 128] float32, contiguous.
        dtype: of the result: bfloat16 or float32.
        locks: `make_locks(w_FD)`: saves a launch where K is split. Not used by the reference.

    Returns:
        [..., F].

    Source: DeepSeek-V3 report, section 3.3.2.
    """
    w = weight_dequant.reference(w_FD, scale_fd, torch.float32)
    return F.linear(dequantize(x), w).to(dtype)
