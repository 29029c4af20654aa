"""Products of rows with the matrices of their experts, the gated activation and weights fused in.

Rows lie sorted by expert, or in a box of equal capacity for each (`permute.Groups`). A persistent
grid shares out the tiles that the counts on the device ask for: experts without rows cost nothing
and the host knows no count. For few rows operands are swapped (a tile is W x^T): matrix units take
at least 64 of what stands first, and as few as 16 of the other. Tiles of many rows are x W^T, W
through TMA where there is one. In either case an element is the same chain of sums of 128 bytes
along D, so a row's result depends on no other row. (That the chains give the same bits swapped and
not holds wherever matrix units treat both operands alike; `tests/kernels/test_grouped_gemm.py`
asserts it on a GPU.)

Three kinds of numbers: float (one type, float32 sums; float32 itself without TF32), float rows with
FP8 matrices (dequantized in registers, as `weight_dequant` would), and FP8 rows quantized 1x128
with FP8 matrices (partial sums of 128 scaled and added in float32).

Bound: reading the matrices that are hit up to about 64 rows an expert, then matrix units.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._e4m3 import decode_e4m3, e4m3_view, is_native
from dsv3_kernels._triton import (
    has_tma,
    is_interpreted,
    multiprocessors,
    tl,
    triton,
    use_triton,
)
from dsv3_kernels.act_quant import BLOCK, Quantized, act_quant, quantize_block
from dsv3_kernels.permute import Groups
from dsv3_kernels.silu_mul import silu_mul_ref
from dsv3_kernels.weight_dequant import weight_dequant


class Stack(NamedTuple):
    """The matrices of the local experts.

    Attributes:
        weight: [E, N, D], float or float8_e4m3fn.
        block_scale: [E, ceil(N / 128), ceil(D / 128)] float32 where the matrices are FP8.
    """

    weight: Tensor
    block_scale: Tensor | None = None

    def matrix(self, e: int, dtype: torch.dtype) -> Tensor:
        """Return matrix `e`, [N, D], dequantized to `dtype` where it is FP8."""
        if self.block_scale is None:
            return self.weight[e]
        return weight_dequant(self.weight[e], self.block_scale[e], dtype)


def dequantize(x: Tensor | Quantized) -> Tensor:
    """Return the values that FP8 rows stand for, float32; float rows as they are."""
    if isinstance(x, Tensor):
        return x
    return (x.q.float().unflatten(-1, (-1, BLOCK)) * x.scale.unsqueeze(-1)).flatten(-2)


def _products(x: Tensor, w: Stack, groups: Groups) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of every expert that is hit, and their products with its matrix."""
    starts, counts = groups.start_E.tolist(), groups.count_E.tolist()
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            rows = slice(start, start + count)
            yield rows, F.linear(x[rows], w.matrix(e, x.dtype))


def _sorted_rows(x_TD: Tensor, groups: Groups) -> Tensor:
    """Return every row's token; rows of no expert repeat the first."""
    if groups.entry_M is None or groups.slot_TK is None or not len(x_TD):
        return x_TD
    return x_TD[groups.entry_M.clamp_min(0) // groups.slot_TK.shape[1]]


def grouped_gate_up_ref(
    x: Tensor | Quantized, w: Stack, groups: Groups, ue8m0: bool = False
) -> Tensor | Quantized:
    """Define `grouped_gate_up`; rows of no expert are 0."""
    x_MD = _sorted_rows(dequantize(x), groups)
    h_MF = x_MD.new_zeros((len(x_MD), w.weight.shape[1] // 2))
    for rows, gate_up in _products(x_MD, w, groups):
        h_MF[rows] = silu_mul_ref(gate_up)
    return h_MF if isinstance(x, Tensor) else act_quant(h_MF, ue8m0)


def grouped_down_ref(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    dtype: torch.dtype,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Define `grouped_down`; rows of no expert are 0."""
    h_MF = dequantize(h)
    y_MD = h_MF.new_zeros((len(h_MF), w.weight.shape[1]), dtype=torch.float32)
    for rows, product in _products(h_MF, w, groups):
        y_MD[rows] = product.float()
    if weight_TK is not None:
        assert groups.entry_M is not None
        y_MD *= weight_TK.flatten()[groups.entry_M.clamp_min(0), None]
    return y_MD.to(dtype)


@triton.jit
def _row_tiles(counts, E, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, TILES_N: tl.constexpr):
    """Return the number of tiles of each expert, [E_PAD]."""
    e = tl.arange(0, E_PAD)
    count = tl.load(counts + e, mask=e < E, other=0)
    return (count + BLOCK_M - 1) // BLOCK_M * TILES_N


@triton.jit
def _place(tile, tiles_E, counts, starts, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return a tile's expert, its block of features, its rows and which of them are real.

    The tiles of one block of features are neighbours: the matrix is read once, then found in L2.
    """
    end_E = tl.cumsum(tiles_E, 0)
    e = tl.sum((end_E <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, E_PAD) < e, tiles_E, 0), 0)
    count = tl.load(counts + e)
    across = (count + BLOCK_M - 1) // BLOCK_M
    row = (tile - before) % across * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < count
    start = tl.load(starts + e).to(tl.int64)
    # Those beyond the last repeat it: nothing outside the expert's rows is ever read.
    return e.to(tl.int64), (tile - before) // across, start + tl.minimum(row, count - 1), real


@triton.jit
def _accumulate(
    acc,
    x,
    w,
    w_scale,
    row_scale,
    KIND: tl.constexpr,
    SWAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the product of a step along D: [features, rows] if SWAPPED, else [rows, features].

    KIND: 0 float, 1 float rows and FP8 matrices, 2 both FP8; 3 and 4 are 1 and 2 where FP8 is
    handed over as bytes.
    """
    if KIND == 3 or KIND == 4:
        w = decode_e4m3(w)
    if KIND == 1 or KIND == 3:
        w = (w.to(tl.float32) * w_scale).to(x.dtype)
    if KIND == 4:  # float16 holds every e4m3 value
        w = w.to(tl.float16)
        x = decode_e4m3(x).to(tl.float16)
    if INTERPRETED and KIND != 4:  # it multiplies the bits of bfloat16 as integers
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    if KIND == 2 or KIND == 4:
        if SWAPPED:
            acc += tl.dot(w, x) * (w_scale * row_scale[None, :])
        else:
            acc += tl.dot(x, w) * (w_scale * row_scale[:, None])
    elif SWAPPED:
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
def _multiply_few(
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
    KIND: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return x W^T, [rows, features], for few rows: operands swapped.

    Features are low.. of N; if GATED those of the gate and then the same of up, in one product,
    since 64 of them are the least that a matrix unit takes.
    """
    FEATURES: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    SCALED: tl.constexpr = KIND > 0
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
        if SCALED:
            at = w_scale + first // 128
            scale = tl.load(at + low // 128 * d)
            if GATED:
                scale = tl.where(is_up, tl.load(at + (N + low) // 128 * d), scale)
        if KIND == 2 or KIND == 4:
            row_scale = tl.load(x_scale + rows * d + first // 128)
        acc = _accumulate(acc, x_tile, w_tile, scale, row_scale, KIND, True, INTERPRETED)
        w_at += BLOCK_K
        x_at += BLOCK_K
    return tl.trans(acc)


@triton.jit
def _multiply_many(
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
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return x W^T of features low.. of N, and if GATED of N + low.. too, both [rows, features].

    With TMA `w` is a descriptor of tiles, else a pointer; `first_row` of it is the expert's.
    """
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    d: tl.constexpr = (D + 127) // 128
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None] * D + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_K):
        x_tile = _load_tile(x_at, (k < D - first)[None, :], True, EVEN_D)
        x_at += BLOCK_K
        row_scale = rows
        if KIND == 2 or KIND == 4:
            row_scale = tl.load(x_scale + rows * d + first // 128)
        at = w_scale + first // 128
        scale = tl.load(at + low // 128 * d) if KIND > 0 else 1.0
        w_tile = _load_matrix(w, first_row + low, first, N - low, D, BLOCK_N, BLOCK_K, TMA)
        acc = _accumulate(acc, x_tile, w_tile, scale, row_scale, KIND, False, INTERPRETED)
        if GATED:
            scale = tl.load(at + (N + low) // 128 * d) if KIND > 0 else 1.0
            w_tile = _load_matrix(w, first_row + N + low, first, N - low, D, BLOCK_N, BLOCK_K, TMA)
            up = _accumulate(up, x_tile, w_tile, scale, row_scale, KIND, False, INTERPRETED)
    return acc, up


@triton.jit
def _gate_up_kernel(
    x,
    x_scale,
    w,
    w_scale,
    h,
    h_scale,
    entries,
    starts,
    counts,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    INTERPRETED: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Share out tiles of silu(gate) * up: BLOCK_N features, computed from as many of either."""
    tiles_E = _row_tiles(counts, E, E_PAD, BLOCK_M, (F + BLOCK_N - 1) // BLOCK_N)
    blocks_f: tl.constexpr = (2 * F + 127) // 128
    blocks_d: tl.constexpr = (D + 127) // 128
    for tile in range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0)):
        e, block, row, real = _place(tile, tiles_E, counts, starts, E_PAD, BLOCK_M)
        low = block * BLOCK_N
        token = row
        if TOP_K > 0:
            token = (tl.load(entries + row) // TOP_K).to(tl.int64)
        at_scale = w_scale + e * blocks_f * blocks_d
        # fmt: off
        if BLOCK_M < 64:
            both = _multiply_few(
                x, x_scale, w + e * 2 * F * D, at_scale, token, low, F, D, True,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, INTERPRETED,
            )
            both = tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
            gate, up = tl.split(both)
        else:
            gate, up = _multiply_many(
                x, x_scale, w, at_scale, token, e * 2 * F, low, F, D, True,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, TMA, INTERPRETED,
            )
        # fmt: on
        value = gate / (1.0 + tl.exp(-gate)) * up
        feature = low + tl.arange(0, BLOCK_N)
        at = row[:, None] * F + feature[None, :]
        mask = real[:, None] & (feature < F)[None, :]
        if QUANT:
            quantized, scale = quantize_block(value, UE8M0, KIND == 2)
            tl.store(h + at, quantized, mask=mask)
            tl.store(h_scale + row * (F // 128) + low // 128, scale, mask=real)
        else:
            tl.store(h + at, value, mask=mask)


@triton.jit
def _down_kernel(
    h,
    h_scale,
    w,
    w_scale,
    y,
    entries,
    weights,
    starts,
    counts,
    E,
    D: tl.constexpr,
    F: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Share out tiles of the second product, every row times its entry's weight."""
    tiles_E = _row_tiles(counts, E, E_PAD, BLOCK_M, (D + BLOCK_N - 1) // BLOCK_N)
    blocks_d: tl.constexpr = (D + 127) // 128
    blocks_f: tl.constexpr = (F + 127) // 128
    for tile in range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0)):
        e, block, row, real = _place(tile, tiles_E, counts, starts, E_PAD, BLOCK_M)
        low = block * BLOCK_N
        at_scale = w_scale + e * blocks_d * blocks_f
        # fmt: off
        if BLOCK_M < 64:
            acc = _multiply_few(
                h, h_scale, w + e * D * F, at_scale, row, low, D, F, False,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, INTERPRETED,
            )
        else:
            acc, _ = _multiply_many(
                h, h_scale, w, at_scale, row, e * D, low, D, F, False,
                BLOCK_M, BLOCK_N, BLOCK_K, KIND, TMA, INTERPRETED,
            )
        # fmt: on
        if WEIGHTED:
            acc *= tl.load(weights + tl.load(entries + row))[:, None]
        feature = low + tl.arange(0, BLOCK_N)
        mask = real[:, None] & (feature < D)[None, :]
        tl.store(y + row[:, None] * D + feature[None, :], acc, mask=mask)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows and features (of the gate, and as many of up) of a tile, and how it is run."""

    rows: int
    features: int
    warps: int
    stages: int
    per_sm: int


def _tile(kind: int, itemsize: int, gated: bool, rows: int) -> _Tile:
    """Choose by the kind of numbers and by how many rows an expert can expect.

    A step along D takes 128 bytes of a row whatever the tile, so the choice changes no bits.
    Compiled for Hopper none spills more than a few registers.
    """
    if itemsize == 4 or kind == 4:  # no matrix unit, or bytes decoded in registers
        features = 64 if itemsize == 1 and not gated else 32
        return _Tile(16, features, 4, 3, 2) if rows <= 16 else _Tile(64, features, 8, 3, 2)
    if rows <= 8:
        return _Tile(16, 32 if gated else 64, 4, 6, 2)
    if rows <= 24:
        return _Tile(32, 32 if gated else 64, 4, 5, 2)
    if rows <= 64:
        return _Tile(64, 64 if gated else 128, 4, 4, 2)
    return _Tile(128, 128, 8, 4, 1)


class _Operands(NamedTuple):
    """Rows and matrices as kernels take them (FP8 perhaps as bytes), each with its scales."""

    x: Tensor
    x_scale: Tensor
    w: Tensor
    w_scale: Tensor
    kind: int


def _operands(x: Tensor | Quantized, w: Stack) -> _Operands:
    native = is_native(w.weight)
    weight = e4m3_view(w.weight) if w.block_scale is not None else w.weight
    w_scale = weight if w.block_scale is None else w.block_scale
    x_rows, x_scale = (x, x) if isinstance(x, Tensor) else (e4m3_view(x.q), x.scale)
    assert x_rows.shape[1] == weight.shape[2], f"{x_rows.shape=} {weight.shape=}"
    assert all(t.is_contiguous() for t in (x_rows, x_scale, weight, w_scale)), f"{weight.stride()=}"
    if isinstance(x, Quantized):
        assert w.block_scale is not None and x_rows.shape[1] % BLOCK == 0, f"{x_rows.shape=}"
        return _Operands(x_rows, x_scale, weight, w_scale, 2 if native else 4)
    assert w.block_scale is not None or weight.dtype == x.dtype, f"{x.dtype=} {weight.dtype=}"
    kind = 0 if w.block_scale is None else 1 if native else 3
    return _Operands(x_rows, x_scale, weight, w_scale, kind)


def _uses_tma(ops: _Operands, tile: _Tile, gated: bool) -> bool:
    """Tell whether tiles of the matrices come through TMA: many rows, on Hopper or later."""
    if tile.rows < 64 or ops.x.element_size() == 4:
        return False
    if gated and ops.kind == 2 and tile.features == BLOCK:
        return False  # no registers are left for it: the loop would spill
    aligned = ops.w.shape[2] * ops.w.element_size() % 16 == 0 and ops.w.data_ptr() % 16 == 0
    return aligned and has_tma(ops.w)


def _matrices(ops: _Operands, tile: _Tile, gated: bool) -> Any:
    """Return the matrices as a descriptor of tiles, or as they are."""
    if not _uses_tma(ops, tile, gated):
        return ops.w
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [tile.features, BLOCK // ops.x.element_size()]
    return TensorDescriptor.from_tensor(ops.w.flatten(0, 1), shape)


def _meta(ops: _Operands, tile: _Tile, gated: bool) -> dict[str, int]:
    """Return the constants of a launch."""
    room = multiprocessors(ops.w)[1] // tile.per_sm - 5120  # less scales, and what is reserved
    step = BLOCK * (tile.rows + tile.features * (2 if gated else 1))
    return {
        "KIND": ops.kind,
        "TMA": _uses_tma(ops, tile, gated),
        "INTERPRETED": is_interpreted(ops.w),
        "E_PAD": triton.next_power_of_2(len(ops.w)),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.features,
        "BLOCK_K": BLOCK // ops.x.element_size(),
        "num_warps": tile.warps,
        "num_stages": max(2, min(tile.stages, room // step)),
    }


def _grid(ops: _Operands, tile: _Tile, features: int, num_rows: int) -> tuple[int]:
    """Return as many programs as the GPU holds at once, or as there may be tiles, if fewer."""
    most = num_rows // tile.rows + min(len(ops.w), num_rows)
    held = multiprocessors(ops.w)[0] * tile.per_sm
    return (min(held, most * triton.cdiv(features, tile.features)),)


def grouped_gate_up_triton(
    x: Tensor | Quantized, w: Stack, groups: Groups, rows: int, ue8m0: bool = False
) -> Tensor | Quantized:
    """Launch the gated product; outputs of tiles too narrow for it are quantized by another."""
    ops = _operands(x, w)
    num_experts, inner = len(w.weight), w.weight.shape[1] // 2
    assert w.block_scale is None or inner % BLOCK == 0, f"{inner=}"
    top_k = 0 if groups.slot_TK is None else groups.slot_TK.shape[1]
    num_rows = len(ops.x) * max(1, top_k)
    tile = _tile(ops.kind, ops.x.element_size(), True, rows)
    fused = isinstance(x, Quantized) and tile.features == BLOCK
    dtype = x.dtype if isinstance(x, Tensor) else torch.float32
    out = Quantized.empty((num_rows, inner), ops.x.device) if fused else None
    h = e4m3_view(out.q) if out else ops.x.new_empty((num_rows, inner), dtype=dtype)
    if num_rows:
        _gate_up_kernel[_grid(ops, tile, inner, num_rows)](
            ops.x,
            ops.x_scale,
            _matrices(ops, tile, True),
            ops.w_scale,
            h,
            out.scale if out else h,
            groups.count_E if groups.entry_M is None else groups.entry_M,
            groups.start_E,
            groups.count_E,
            num_experts,
            F=inner,
            D=ops.x.shape[1],
            TOP_K=top_k,
            QUANT=fused,
            UE8M0=ue8m0,
            **_meta(ops, tile, True),
        )
    if out is not None:
        return out
    return act_quant(h, ue8m0) if isinstance(x, Quantized) else h


def grouped_down_triton(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    rows: int,
    dtype: torch.dtype,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Launch the second product."""
    ops = _operands(h, w)
    num_experts, hidden, inner = w.weight.shape
    assert weight_TK is None or groups.entry_M is not None
    num_rows = len(ops.x)
    y_MD = torch.empty((num_rows, hidden), dtype=dtype, device=ops.x.device)
    if num_rows:
        tile = _tile(ops.kind, ops.x.element_size(), False, rows)
        _down_kernel[_grid(ops, tile, hidden, num_rows)](
            ops.x,
            ops.x_scale,
            _matrices(ops, tile, False),
            ops.w_scale,
            y_MD,
            groups.count_E if groups.entry_M is None else groups.entry_M,
            ops.x_scale if weight_TK is None else weight_TK.contiguous(),
            groups.start_E,
            groups.count_E,
            num_experts,
            D=hidden,
            F=inner,
            WEIGHTED=weight_TK is not None,
            **_meta(ops, tile, False),
        )
    return y_MD


def grouped_gate_up(
    x: Tensor | Quantized, w: Stack, groups: Groups, rows: int, ue8m0: bool = False
) -> Tensor | Quantized:
    """Return silu(W_gate x) * (W_up x) of every row's expert.

    Args:
        x: [T, D] where `groups` are sorted entries (row m is token entry_M[m] // K), else [M, D];
            float, or quantized 1x128 (then the matrices are FP8).
        w: [E, 2F, D], the gate in the first half; FP8 needs F, and for quantized rows D, to be
            multiples of 128.
        groups: which rows belong to which expert.
        rows: how many rows an expert can expect; it decides the speed alone.
        ue8m0: scales of the result are powers of two.

    Returns:
        h_MF: [M, F], of the dtype of `x`, quantized from float32 if `x` is; rows of no expert are
            undefined.
    """
    if use_triton(w.weight):
        return grouped_gate_up_triton(x, w, groups, rows, ue8m0)
    return grouped_gate_up_ref(x, w, groups, ue8m0)


def grouped_down(
    h: Tensor | Quantized,
    w: Stack,
    groups: Groups,
    rows: int,
    dtype: torch.dtype,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Return W_down h of every row's expert, times the weight of its entry.

    Args:
        h: [M, F], float or quantized 1x128.
        w: [E, D, F]; FP8 for quantized rows needs F to be a multiple of 128.
        groups: which rows belong to which expert.
        rows: how many rows an expert can expect; it decides the speed alone.
        dtype: of the result.
        weight_TK: [T, K] float32, or None for no factor.

    Returns:
        y_MD: [M, D]; rows of no expert are undefined.
    """
    if use_triton(w.weight):
        return grouped_down_triton(h, w, groups, rows, dtype, weight_TK)
    return grouped_down_ref(h, w, groups, dtype, weight_TK)
