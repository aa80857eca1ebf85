"""What the cells of a report's tables hold, where a test counts on a number."""

from __future__ import annotations

from splitray.report.document import Cell, Number


def value_of(cell: Cell) -> float:
    """The value of a figure that there is."""
    assert isinstance(cell, Number) and cell.value is not None, f"expected a Number with a value, got {cell!r}"
    return cell.value
