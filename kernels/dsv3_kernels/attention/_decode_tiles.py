"""Tiling of decode attention: rows and keys per step, splits, programs."""

from dataclasses import dataclass
from functools import cache

# Approximate programs per launch: eight for each multiprocessor.
_PROGRAMS = 1024
# Bytes of partial outputs at a time: for 128 heads and 1,024 splits, two per program.
_SPLIT_BYTES = 256 << 20
# Positions of the shortest split; by arithmetic, not measured.
_LEAST_SPLIT = 64


def programs_for(splits: int, others: int) -> int:
    """Return the number of programs that share a sequence's splits; no result depends on it.

    Tables may be far wider than contexts are long; then most programs would have an empty split if
    each had only one.
    """
    return max(1, min(splits, _PROGRAMS // others))


def sequences_for(splits: int, values: int) -> int:
    """Return the number of sequences per launch, so that partial outputs take little memory.

    No result depends on it. A split has `values` values of partial outputs.
    """
    return max(1, _SPLIT_BYTES // (4 * splits * values))


@dataclass(frozen=True, slots=True)
class Tile:
    """The work of one program.

    Attributes:
        rows: queries times heads of a sequence.
        keys: positions per step.
        split: positions per split.
        warps, stages: of the launch.
    """

    rows: int
    keys: int
    split: int
    warps: int
    stages: int


@cache
def split_for(longest: int, others: int, held: int, multiprocessors: int) -> int:
    """Return the positions per split: at most `longest`, fewer if the GPU would be idle.

    Every program reads its positions at its multiprocessor's share of bandwidth, so a single
    sequence should use half of the GPU. More splits cost the bytes of their partial outputs.

    Args:
        longest: best length for many sequences.
        others: programs per split.
        held: positions that the tables could hold here.
        multiprocessors: of the GPU.
    """
    split = longest
    while split > _LEAST_SPLIT and others * -(-held // split) < multiprocessors // 2:
        split //= 2
    return split


@cache
def tile_for(rows: int, is_exact: bool, is_hopper: bool) -> Tile:
    """Return the tile for this many rows; the larger tiles fill a Hopper's shared memory."""
    if is_exact:
        return Tile(rows=16, keys=16, split=512, warps=4, stages=2)
    if rows <= 16 or not is_hopper:
        return Tile(rows=16, keys=32, split=512, warps=4, stages=5 if is_hopper else 3)
    if rows <= 32:
        return Tile(rows=32, keys=32, split=512, warps=8, stages=5)
    return Tile(rows=64, keys=64, split=1024, warps=8, stages=3)
