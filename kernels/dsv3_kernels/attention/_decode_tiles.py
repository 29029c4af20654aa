"""How decode attention over latents is cut into programs: rows, keys at a time, splits."""

from typing import NamedTuple

# Programs of a launch, about: eight for each multiprocessor.
_PROGRAMS = 1024
# Bytes of partial results held at a time: with 128 heads of 1,024 splits, two for each program.
_SPLIT_BYTES = 256 << 20
# Positions of the shortest splits; by arithmetic, not measured.
_LEAST_SPLIT = 64


def programs_for(splits: int, others: int) -> int:
    """Return the programs that share a sequence's splits; no result depends on them.

    Tables may be far wider than contexts are long: then a program for each split would most often
    only come and go.
    """
    return max(1, min(splits, _PROGRAMS // others))


def sequences_for(splits: int, values: int) -> int:
    """Return the sequences of a launch: their splits' results, `values` each, take little memory.

    No result depends on them.
    """
    return max(1, _SPLIT_BYTES // (4 * splits * values))


class Tile(NamedTuple):
    """What one program does, by the shape of the queries alone.

    Attributes:
        rows: queries times heads of a sequence.
        keys: positions at a time.
        split: positions in all.
        warps, stages: of the launch.
    """

    rows: int
    keys: int
    split: int
    warps: int
    stages: int


def split_for(longest: int, others: int, held: int, multiprocessors: int) -> int:
    """Return the positions of a split: at most `longest`, fewer where GPUs would be idle.

    Every program reads its positions at its multiprocessor's share of bandwidth: a single
    sequence's should be spread over half of the GPU. More splits cost their results' bytes.

    Args:
        longest: what is best with many sequences.
        others: programs of a split.
        held: positions that the tables could hold here.
        multiprocessors: of the GPU.
    """
    split = longest
    while split > _LEAST_SPLIT and others * -(-held // split) < multiprocessors // 2:
        split //= 2
    return split


def tile_for(rows: int, is_exact: bool, is_hopper: bool) -> Tile:
    """Return the tile of so many rows; the larger ones fill a Hopper's shared memory."""
    if is_exact:
        return Tile(16, 16, 512, 4, 2)
    if rows <= 16 or not is_hopper:
        return Tile(16, 32, 512, 4, 5 if is_hopper else 3)
    return Tile(32, 32, 512, 8, 5) if rows <= 32 else Tile(64, 64, 1024, 8, 3)
