"""A table of measured figures, with what was run above it and what to make of it below."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Table:
    """Figures of one kind.

    Attributes:
        rows: of the table, all with the same columns.
        notes: lines below the table: ratios and what they were taken from.
        setting: what was run, and where.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    setting: Row = field(default_factory=dict)

    def __str__(self) -> str:
        setting = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        return "\n".join([setting, "", *_lines(self.rows), "", *self.notes])


def _lines(rows: Sequence[Row]) -> list[str]:
    """Return lines with aligned columns, text to the left and numbers to the right."""
    if not rows:
        return []
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = np.max([[len(cell) for cell in line] for line in cells], axis=0)
    is_text = [isinstance(value, str) for value in rows[0].values()]
    return [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
