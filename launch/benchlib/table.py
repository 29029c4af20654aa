"""Tables as lines of text; needs neither torch nor numpy."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return table lines with aligned columns: text to the left, numbers to the right."""
    if not rows:
        return []
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [isinstance(value, str) for value in rows[0].values()]
    return [
        "  ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]


def cell(value: Any) -> str:
    """Return a value as the text of a cell; None is -."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
