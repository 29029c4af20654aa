"""Split-K for few rows of x times a matrix W: the grid of programs, and the sum of their splits.

Bound by reading W. Operands are swapped (y^T = W x^T), so that 64 rows of W fill the first side of
a matrix unit and the few rows of x its narrow second. K is cut into splits, their number depending
on (N, K), until all multiprocessors read. The splits are added in order: by the program that ends
last, or where tiles are large by a second launch. The splits and their order do not depend on the
number of rows, so a row's result does not either.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2, row_bucket
from dsv3_kernels._triton import in_turn, launch_gpu, launch_options, tl, triton

# Rows of W per program.
ROWS = 64
# Programs that keep a large GPU's memory busy: one on each multiprocessor of Hopper.
WANTED = 132
# Bytes of shared memory per program in addition to its blocks, at most.
_OTHER = 4096


@cache
def splits_of(N: int, blocks: int) -> int:
    """Return the number of splits of a row of W that has `blocks` blocks of 128 bytes."""
    tiles = cdiv(N, ROWS)
    # At least four blocks per split: by arithmetic, fewer take less time than the sum. With enough
    # tiles, one split saves the sum.
    return max(1, min(round(WANTED / tiles), blocks // 4, 16))


@cache
def _stages(
    programs: int, rows: int, blocks: int, shared_bytes: int, w_bytes: int, x_bytes: int
) -> int:
    """Return the number of blocks of K to hold in shared memory; by arithmetic.

    With one more than a program multiplies, all loads are in flight at once; further ones would
    only delay its start. Otherwise as many as fit while all programs run at once, up to eight of
    128 bytes: 56 KiB of W in flight, or sixteen smaller ones. A multiprocessor has registers for
    three programs, or for two of 128 rows.
    """
    per_sm = cdiv(programs, WANTED)
    most = 3 if rows <= 64 else 2
    room = shared_bytes // (per_sm if per_sm <= most else 2) - _OTHER
    fitting = room // (w_bytes * ROWS + x_bytes * rows)
    return max(2, min(8 if w_bytes == 128 else 16, blocks + 1, fitting))


def make_locks(w_FD: Tensor) -> Tensor:
    """Return counters for summing the splits of few rows in the same launch.

    They belong to one weight; launches that share them must follow one another.
    """
    return torch.zeros(cdiv(w_FD.shape[-2], ROWS), dtype=torch.int32, device=w_FD.device)


@dataclass(frozen=True, slots=True)
class SplitK:
    """The grid of a product, and memory for its splits.

    Attributes:
        rows: rows of x per program.
        splits: programs per row of W.
        blocks: blocks of K per program, at most.
        part: [splits, M, N] float32 for the results of splits; empty for one split.
        locks: counters; not read unless `locked`.
        locked: True if the last program of a tile sums its splits.
    """

    rows: int
    splits: int
    blocks: int
    part: Tensor
    locks: Tensor
    locked: bool

    @staticmethod
    def of(y_MN: Tensor, blocks: int, most: int, locks: Tensor | None) -> "SplitK":
        """Return the grid over `blocks` blocks of K, with at most `most` rows per program."""
        M, N = y_MN.shape
        rows = min(most, max(16, next_power_of_2(M)))
        splits = splits_of(N, blocks)
        each = cdiv(blocks, splits)
        shape = (splits, M, N) if splits > 1 else (0,)
        part = torch.empty(shape, dtype=torch.float32, device=y_MN.device)
        # One program reads all splits of its tile: up to 128 KiB, by arithmetic, this is faster
        # than a launch. There is a lock for each tile of W, so x must be one tile.
        if splits > 1 and splits * rows <= 512 and rows >= M and locks is not None:
            return SplitK(rows, splits, each, part, locks, True)
        return SplitK(rows, splits, each, part, part, False)

    def grid(self, M: int, N: int) -> tuple[int, int, int]:
        """Return the grid: tiles of W, splits, tiles of x."""
        return cdiv(N, ROWS), self.splits, cdiv(M, self.rows)

    def stages(self, y_MN: Tensor, w_bytes: int = 128, x_bytes: int = 128) -> int:
        """Return the number of blocks of K to hold in shared memory.

        Args:
            y_MN: the result.
            w_bytes: bytes of a block in a row of W.
            x_bytes: bytes of a block in a row of x.
        """
        M, N = y_MN.shape
        tiles, splits, m_tiles = self.grid(row_bucket(M), N)
        programs = tiles * splits * m_tiles
        shared_bytes = launch_gpu(y_MN).shared_bytes
        return _stages(programs, self.rows, self.blocks, shared_bytes, w_bytes, x_bytes)

    def finish(self, y_MN: Tensor) -> None:
        """Sum the splits by a second launch if the programs of the product did not."""
        if self.splits > 1 and not self.locked:
            size = y_MN.numel()
            _sum_parts_kernel[(cdiv(size, 1024),)](
                part_ptr=self.part,
                y_ptr=y_MN,
                size=size,
                SPLITS=self.splits,
                B=1024,
                **launch_options(),
            )


@triton.jit
def store_split(
    y,
    y_ptr,
    part_ptr,
    lock_ptr,
    m,
    n,
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    LOCKED: tl.constexpr,
):
    """Store a split's [BM, BN]; if LOCKED, the last program of several splits sums them all."""
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if SPLITS == 1:
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        size = M.to(tl.int64) * N
        tl.store(part_ptr + tl.program_id(1) * size + at, y, mask=mask)
        if LOCKED:
            # All threads' stores come before the count, the count before the loads.
            tl.debug_barrier()
            lock_at = lock_ptr + tl.program_id(0)  # x is one tile
            if tl.atomic_add(lock_at, 1, sem="acq_rel") == SPLITS - 1:
                total = tl.zeros((BM, BN), tl.float32)
                for s in range(SPLITS):
                    part_at = part_ptr + s * size + at
                    total += tl.load(part_at, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)
                tl.store(lock_at, 0)  # as the next launch expects it


@triton.jit(do_not_specialize=["size"])
def _sum_parts_kernel(part_ptr, y_ptr, size, SPLITS: tl.constexpr, B: tl.constexpr):
    """Sum the splits in order."""
    in_turn()
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros((B,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(part_ptr + s * size + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)
