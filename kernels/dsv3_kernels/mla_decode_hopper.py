"""`mla_decode` for many heads on Hopper: four groups of warps that meet at barriers, in Gluon.

A program takes 64 rows (heads and new tokens of a sequence) and some splits of the positions held
here, as `_mla_decode_kernel` does, and writes the same: an output and a log-sum-exp for each split.
128 heads are two programs side by side that find each other's keys in L2. Its groups, of four
warps each, hand on a block of 64 keys:

- `_load_keys` copies the block's rows from their pages, 16 bytes a thread, into one of two stages:
  a quarter of the latents after another, then the rotated keys. Pages may be smaller than blocks.
- `_score` multiplies them with the queries, takes their softmax and puts its numerators where the
  rotated keys were, which nobody needs any more, with what the sums so far have to be scaled by.
- Two of `_weigh` hold a half of the output each, 64 x 256 in 128 registers a thread. Each scales
  it, adds numerators times its half of the latents, and gives that back, quarter by quarter.

So the next block is loaded and multiplied as its quarters come and go, and its softmax is taken
while the block before is being weighed, if it is there already.

What bounds it, on an H100: 8.9 MFLOP a block keep the matrix units busy for 2,200 cycles (4,096
FLOPs each), reading operands at about the rate of shared memory. The queries (72 KiB) leave it two
stages (72 KiB each): while one block is being weighed and the next one multiplied, no memory is
left to load into. So two blocks take at least as long as a load's latency and a block's scores,
softmax and weighing one after the other, about 1,200 + 600 + 1,000 cycles. Such sums, which no GPU
has been asked about, say 3,000 cycles a block; 400 TFLOP/s are 4,700 at 1.6 GHz.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3_kernels._gluon import HAS_GLUON, copy_async, gl, gluon, hopper, thread_barrier
from dsv3_kernels._triton import is_hopper, is_tried

mbarrier, async_copy = hopper.mbarrier, hopper.async_copy
fence_async_shared = hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait


@gluon.jit
def _place(row, H: gl.constexpr, HEADS: gl.constexpr):
    """Return whose the row's head is, and which of their rows in this sequence: see the kernel."""
    return row % H // HEADS, row // H * HEADS + row % HEADS


@gluon.constexpr_function
def _quarter(i):
    """Return which quarter of the latents is the i-th: first those that are given back first."""
    return i % 2 * 2 + i // 2


@gluon.jit
def _load_keys(keys, bars, table, cache, span, STRIDE: gl.constexpr, PAGE: gl.constexpr):
    """Fill the stages with the rows of all blocks, zeros behind the last position."""
    latent, rope = keys
    full, _ready, free = bars
    first, needed, step, seen, SPLIT = span
    KEYS: gl.constexpr = latent.shape[1]
    QUARTER: gl.constexpr = latent.shape[2]
    R: gl.constexpr = rope.shape[2]
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, tile))
    c = gl.arange(0, QUARTER, layout=gl.SliceLayout(0, tile))
    r = gl.arange(0, R, layout=gl.SliceLayout(0, tile))
    block = 0
    for split in range(first, needed, step):
        for start in range(split * SPLIT, gl.minimum(split * SPLIT + SPLIT, seen), KEYS):
            at = start + key
            held = at < seen
            page = gl.load(table + at // PAGE, mask=held, other=0).to(gl.int64)
            entry = cache + ((page * PAGE + at % PAGE) * STRIDE)[:, None]
            held = held[:, None]
            stage = block % 2
            # The first time round nobody has to give a stage back.
            phase = (block // 2 + 1) % 2
            for i in gl.static_range(4):
                place = stage * 4 + _quarter(i)
                mbarrier.wait(free.index(place), phase)
                copy_async(latent.index(place), entry + (_quarter(i) * QUARTER + c)[None, :], held)
                # Numerators lie in `rope`: the last quarters must have been weighed.
                if i == 3:
                    copy_async(rope.index(stage), entry + (4 * QUARTER + r)[None, :], held)
                async_copy.mbarrier_arrive(full.index(place), increment_count=False)
            block += 1


@gluon.jit
def _score(queries, keys, sums, bars, pos_row, out, span, rows, scale_log2, sizes: gl.constexpr):
    """Turn every block's keys into numerators, the factor of earlier ones, and their sum so far."""
    q_latent, q_rope = queries
    latent, rope = keys
    decays, totals = sums
    full, ready, _free = bars
    first, needed, step, seen, SPLIT = span
    lse_ptr, stride_owner, stride_split = out
    first_row, num_rows = rows
    H, HEADS, LSE_ROW, SHARDS, SHARD = sizes
    ROWS: gl.constexpr = q_rope.shape[0]
    KEYS: gl.constexpr = rope.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    row = first_row + gl.arange(0, ROWS, layout=by_row)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, mma))
    query_pos = gl.load(pos_row + row // H, mask=row < num_rows, other=-1).to(gl.int32)
    visible = (query_pos + SHARDS - SHARD) // SHARDS
    block = 0
    for split in range(first, needed, step):
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
        total = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
        for start in range(split * SPLIT, gl.minimum(split * SPLIT + SPLIT, seen), KEYS):
            stage = block % 2
            score = gl.full([ROWS, KEYS], 0.0, gl.float32, layout=mma)
            for i in gl.static_range(4):
                place = stage * 4 + _quarter(i)
                mbarrier.wait(full.index(place), block // 2 % 2)
                fence_async_shared()
                q, k = q_latent.index(_quarter(i)), latent.index(place).permute((1, 0))
                score = warpgroup_mma(q, k, score, use_acc=i > 0, is_async=True)
            score = warpgroup_mma(q_rope, rope.index(stage).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=(score,))
            score = gl.where((start + key)[None, :] < visible[:, None], score, float("-inf"))
            best = gl.maximum(top, gl.max(score, 1) * scale_log2)
            shift = gl.where(best == float("-inf"), 0.0, best)
            p = gl.exp2(score * scale_log2 - shift[:, None])
            decay = gl.exp2(top - shift)
            total = total * decay + gl.sum(p, 1)
            top = best
            # Other warps may still be reading the rotated keys.
            thread_barrier()
            rope.index(stage).store(p.to(rope.dtype))
            decays.index(stage).store(decay)
            totals.index(stage).store(total)
            fence_async_shared()
            thread_barrier()
            mbarrier.arrive(ready.index(stage), count=1)
            block += 1
        owner, owned = _place(row, H, HEADS)
        lse_at = lse_ptr + split * stride_split + (owner * stride_owner + owned * LSE_ROW)
        lse = (top + gl.log2(gl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
        gl.store(lse_at, lse, mask=row < num_rows)


@gluon.jit
def _weigh(keys, sums, bars, out, span, rows, sizes: gl.constexpr, FIRST: gl.constexpr):
    """Sum two quarters of the latents, FIRST and the next, weighed by every block's numerators."""
    latent, numerators = keys
    decays, totals = sums
    _full, ready, free = bars
    first, needed, step, seen, SPLIT = span
    o_ptr, stride_owner, stride_split = out
    first_row, num_rows = rows
    H, HEADS, O_ROW = sizes
    ROWS: gl.constexpr = numerators.shape[1]
    KEYS: gl.constexpr = latent.shape[1]
    QUARTER: gl.constexpr = latent.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    row = first_row + gl.arange(0, ROWS, layout=by_row)
    c = FIRST * QUARTER + gl.arange(0, QUARTER, layout=gl.SliceLayout(0, mma))
    block = 0
    for split in range(first, needed, step):
        left = gl.full([ROWS, QUARTER], 0.0, gl.float32, layout=mma)
        right = gl.full([ROWS, QUARTER], 0.0, gl.float32, layout=mma)
        total = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
        for _ in range(split * SPLIT, gl.minimum(split * SPLIT + SPLIT, seen), KEYS):
            stage = block % 2
            place = stage * 4 + FIRST
            # Whoever says `ready` has fenced what it and the copies wrote.
            mbarrier.wait(ready.index(stage), block // 2 % 2)
            decay = decays.index(stage).load(by_row)
            total = totals.index(stage).load(by_row)
            p = numerators.index(stage)
            left, right = left * decay[:, None], right * decay[:, None]
            left = warpgroup_mma(p, latent.index(place), left, is_async=True)
            right = warpgroup_mma(p, latent.index(place + 1), right, is_async=True)
            left = warpgroup_mma_wait(1, deps=(left,))
            thread_barrier()
            mbarrier.arrive(free.index(place), count=1)
            right = warpgroup_mma_wait(0, deps=(right,))
            thread_barrier()
            mbarrier.arrive(free.index(place + 1), count=1)
            block += 1
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        owner, owned = _place(row, H, HEADS)
        # Rows, then columns: their constant distances become a part of the instructions.
        o_row = o_ptr + split * stride_split + (owner * stride_owner + owned * O_ROW)[:, None]
        is_row = (row < num_rows)[:, None]
        left, right = left * share[:, None], right * share[:, None]
        gl.store(o_row + c[None, :], left.to(o_ptr.dtype.element_ty), mask=is_row)
        gl.store(o_row + (c + QUARTER)[None, :], right.to(o_ptr.dtype.element_ty), mask=is_row)


@gluon.jit
def _load_queries(q_row, is_row, queries, tile: gl.constexpr):
    """Copy a tile of queries to where the matrix units find it, zeros behind the last row."""
    q_latent, q_rope = queries
    QUARTER: gl.constexpr = q_latent.shape[2]
    R: gl.constexpr = q_rope.shape[1]
    c = gl.arange(0, QUARTER, layout=gl.SliceLayout(0, tile))
    r = gl.arange(0, R, layout=gl.SliceLayout(0, tile))
    for i in gl.static_range(4):
        copy_async(q_latent.index(i), q_row + (i * QUARTER + c)[None, :], is_row)
    copy_async(q_rope, q_row + (4 * QUARTER + r)[None, :], is_row)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit(
    do_not_specialize=["lse_stride_owner", "lse_stride_split", "pages", "queries", "num_rows"]
)
def _mla_decode_hopper_kernel(
    q_ptr,
    cache_ptr,
    page_ptr,
    pos_ptr,
    o_ptr,
    lse_ptr,
    q_stride_owner,
    o_stride_owner,
    o_stride_split,
    lse_stride_owner,
    lse_stride_split,
    pages,
    queries,
    num_rows,
    scale_log2,
    H: gl.constexpr,
    HEADS: gl.constexpr,
    O_ROW: gl.constexpr,
    LSE_ROW: gl.constexpr,
    C: gl.constexpr,
    R: gl.constexpr,
    STRIDE: gl.constexpr,
    PAGE: gl.constexpr,
    SHARDS: gl.constexpr,
    SHARD: gl.constexpr,
    BLOCK: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """One program: BLOCK of a sequence's Q * H queries, some splits of the positions held here.

    Every HEADS of the H heads are another rank's, and lie together with its other tokens'. STRIDE
    is a cache entry's; the rest is as in `_mla_decode_kernel`.
    """
    QUARTER: gl.constexpr = C // 4
    b = gl.program_id(2).to(gl.int64)
    first_row = gl.program_id(0) * BLOCK
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = first_row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, tile))
    pos_row = pos_ptr + b * queries
    is_row = row < num_rows
    query_pos = gl.load(pos_row + row // H, mask=is_row, other=-1).to(gl.int32)
    # Positions held here that some row of the program sees.
    seen = (gl.max(query_pos, 0) + SHARDS - SHARD) // SHARDS
    needed = gl.maximum(1, gl.cdiv(seen, SPLIT))
    if gl.program_id(1) < needed:
        wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, QUARTER], gl.bfloat16)
        thin: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, R], gl.bfloat16)
        line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        barrier: gl.constexpr = mbarrier.MBarrierLayout()
        q_latent = gl.allocate_shared_memory(gl.bfloat16, [4, BLOCK, QUARTER], wide)
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, R], thin)
        # Of two stages.
        latent = gl.allocate_shared_memory(gl.bfloat16, [2 * 4, BLOCK, QUARTER], wide)
        rope = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, R], thin)
        decays = gl.allocate_shared_memory(gl.float32, [2, BLOCK], line)
        totals = gl.allocate_shared_memory(gl.float32, [2, BLOCK], line)
        full = gl.allocate_shared_memory(gl.int64, [2 * 4, 1], barrier)
        ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
        free = gl.allocate_shared_memory(gl.int64, [2 * 4, 1], barrier)
        for i in gl.static_range(8):
            # Every thread that copies arrives when its copies have.
            mbarrier.init(full.index(i), count=128)
            mbarrier.init(free.index(i), count=1)
        for i in gl.static_range(2):
            mbarrier.init(ready.index(i), count=1)
        owner, owned = _place(row, H, HEADS)
        own = b * queries * HEADS
        q_row = q_ptr + own * (C + R) + (owner * q_stride_owner + owned * (C + R))[:, None]
        q_tiles, keys, sums = (q_latent, q_rope), (latent, rope), (decays, totals)
        _load_queries(q_row, is_row[:, None], q_tiles, tile)
        bars = full, ready, free
        span = gl.program_id(1), needed, gl.num_programs(1), seen, SPLIT
        rows = first_row, num_rows
        lse = lse_ptr + own * LSE_ROW, lse_stride_owner, lse_stride_split.to(gl.int64)
        o = o_ptr + own * O_ROW, o_stride_owner, o_stride_split.to(gl.int64)
        o_sizes: gl.constexpr = (H, HEADS, O_ROW)
        sizes: gl.constexpr = (H, HEADS, LSE_ROW, SHARDS, SHARD)
        gl.warp_specialize(
            [
                (_score, (q_tiles, keys, sums, bars, pos_row, lse, span, rows, scale_log2, sizes)),
                (_weigh, (keys, sums, bars, o, span, rows, o_sizes, 0)),
                (_weigh, (keys, sums, bars, o, span, rows, o_sizes, 2)),
                (_load_keys, (keys, bars, page_ptr + b * pages, cache_ptr, span, STRIDE, PAGE)),
            ],
            [4, 4, 4],
            [168, 168, 40],
        )


def require_hopper(x: Tensor) -> None:
    """Refuse what the kernel cannot run on.

    Raises:
        RuntimeError: `x` is on another GPU, or this Triton has no Gluon.
    """
    if not (HAS_GLUON and is_hopper(x)):
        raise RuntimeError(
            "mla_decode in Gluon needs a GPU of compute capability 9 and Triton 3.6 or later: "
            "leave gluon out of --try-kernels"
        )


def takes_hopper(q_PTHX: Tensor, cache_SX: Tensor, rows: int, value_dim: int) -> bool:
    """Tell whether this kernel is to be tried (`try_kernels`) and fits.

    It is made for more than 32 rows over a bf16 cache; the plain kernel does everything.

    Raises:
        RuntimeError: this GPU or this Triton cannot run it.
    """
    if not is_tried("gluon"):
        return False
    require_hopper(q_PTHX)
    is_bf16 = q_PTHX.dtype == cache_SX.dtype == torch.bfloat16
    return is_bf16 and rows > 32 and (value_dim, cache_SX.shape[1]) == (512, 576)


def launch_hopper(
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    places: tuple[int, int, int],
    split: int,
) -> None:
    """Launch the kernel: `tensors` from q to lse, strides and `sizes` from q's to R, and places."""
    q_PTHX, cache_SX = tensors[:2]
    scale_log2, R = sizes[8], sizes[-1]
    assert q_PTHX.dtype == cache_SX.dtype == torch.bfloat16, f"{q_PTHX.dtype=} {cache_SX.dtype=}"
    assert scale_log2 > 0 and split % R == 0, f"{scale_log2=} {split=} {R=}"
    starts = [2 * x.stride(0) for x in tensors[:2]] + [x.data_ptr() for x in tensors[:2]]
    assert all(at % 16 == 0 for at in starts), f"copies are of 16 bytes, {starts=}"
    _mla_decode_hopper_kernel[grid](
        *tensors, *sizes, cache_SX.stride(0), *places, R, split, num_warps=4
    )
