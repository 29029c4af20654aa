"""Tiling of decode attention: rows and keys per step, splits, programs, memory."""

from dataclasses import dataclass
from functools import cache

from dsv3_kernels._gpu import cdiv

# Approximate programs per launch: eight for each multiprocessor.
_PROGRAMS = 1024
# CUDA's limit for a grid's second dimension.
_MOST_PROGRAMS = 65535
# Bytes of partial outputs at a time: for 128 heads and 1,024 splits, two per program.
_SPLIT_BYTES = 256 << 20
# Positions of the shortest split; by arithmetic, not measured.
_LEAST_SPLIT = 64
# Sequences of up to _WHOLE of the longest splits are not split further if each multiprocessor has
# _BUSY programs or more.
_WHOLE = 4
_BUSY = 4


def programs_for(parts: int, tiles: int, sequences: int) -> int:
    """Return the number of programs that share the parts of a tile; no result depends on it.

    Tables may be far wider than contexts are long; then most programs would have no part if there
    were one for each part that the tables allow.
    """
    return min(_MOST_PROGRAMS, max(sequences, min(parts, _PROGRAMS // tiles)))


def numbered_at_once(sequences: int) -> int:
    """Return the number of sequences whose parts a program counts at a time.

    One for each thread of a warp in a decode step; more for the queries of a prompt that attend to
    selected slots, since each of them is a sequence of its own.
    """
    return 32 if sequences <= 256 else 512


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory for the partial outputs of a launch.

    Attributes:
        sequences: most sequences of a launch.
        parts: partial outputs.
        spare: parts that are left when each sequence has one; 0 if the parts of any contexts fit.
    """

    sequences: int
    parts: int
    spare: int


def pool_for(sequences: int, splits: int, values: int, is_fixed: bool) -> Pool:
    """Return the memory for the partial outputs of a launch: about `_SPLIT_BYTES` at most.

    Args:
        sequences: sequences to be computed.
        splits: splits of a sequence as long as the tables allow, if no split is lengthened.
        values: values of a part.
        is_fixed: splits are never lengthened; instead a launch may compute fewer sequences.
    """
    fit = _SPLIT_BYTES // (4 * values)
    if is_fixed or sequences * splits <= fit:
        sequences = max(1, min(sequences, fit // splits))
        return Pool(sequences, sequences * splits, spare=0)
    # Two parts for each sequence on average, so that a long one among short ones has many.
    sequences = max(1, min(sequences, fit // 2))
    parts = max(fit, 2 * sequences)
    return Pool(sequences, parts, spare=parts - sequences)


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
    """Return the positions per split: `longest`, or fewer if the GPU would be idle.

    Every program reads its positions at its multiprocessor's share of bandwidth, so a single
    sequence should use half of the GPU. More splits cost the bytes of their partial outputs, so
    short sequences that are enough to keep a GPU busy are not split (for example, the queries of a
    prompt that attend to selected slots).

    Args:
        longest: best length for many long sequences.
        others: programs that each split adds.
        held: positions per sequence that the tables could hold on this rank.
        multiprocessors: number of multiprocessors of the GPU.
    """
    if held <= _WHOLE * longest and others >= _BUSY * multiprocessors:
        return _WHOLE * longest
    split = longest
    while split > _LEAST_SPLIT and others * cdiv(held, split) < multiprocessors // 2:
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
