"""Slices of tensors in coordinates of the whole tensor."""

from collections.abc import Sequence
from typing import NamedTuple

Region = tuple[tuple[int, int], ...]
"""(start, stop) of each dimension."""


def whole(shape: Sequence[int]) -> Region:
    """Return the region that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """Return the shape of a region."""
    return tuple(stop - start for start, stop in region)


class Box(NamedTuple):
    """A region in rows and bytes within a row."""

    row: int
    row_stop: int
    col: int
    col_stop: int

    @classmethod
    def of(cls, region: Region, itemsize: int) -> "Box":
        """Return the box of a region with at most two dimensions."""
        assert len(region) <= 2, f"{region=}"
        (row, row_stop), (col, col_stop) = ((0, 1),) * (2 - len(region)) + region
        return cls(row, row_stop, col * itemsize, col_stop * itemsize)

    @property
    def is_empty(self) -> bool:
        """True if the box has no bytes."""
        return self.row >= self.row_stop or self.col >= self.col_stop

    def intersection(self, other: "Box") -> "Box":
        """Return the intersection of two boxes, which may be empty."""
        return Box(
            max(self.row, other.row),
            min(self.row_stop, other.row_stop),
            max(self.col, other.col),
            min(self.col_stop, other.col_stop),
        )

    def minus(self, part: "Box") -> "list[Box]":
        """Return the boxes that remain around a part of this box."""
        boxes = [
            self._replace(row_stop=part.row),
            self._replace(row=part.row_stop),
            part._replace(col=self.col, col_stop=part.col),
            part._replace(col=part.col_stop, col_stop=self.col_stop),
        ]
        return [box for box in boxes if not box.is_empty]
