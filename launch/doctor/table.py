"""Rows of checks as one table of text: a column for each node, differing values marked, a verdict behind each row."""

from collections.abc import Iterator, Sequence

from spade_t5.launch.doctor.checks import Row
from spade_t5.messages import printable

MAX_NODES = 6
"""Columns; of more nodes those are shown on which something was found, after the first."""
MARK = "*"
_MAX_CELL = 40


def table(nodes: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """The lines of the table.

    Args:
        nodes: their names.
        rows: with as many cells.
    """
    shown = _shown(nodes, rows)
    lines = [["check", *(nodes[column] for column in shown), ""]]
    for row in rows:
        cells = [f"{_cell(row.cells[column])}{MARK if row.is_marked[column] else ' '}" for column in shown]
        lines.append([row.title, *cells, row.verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    if len(shown) < len(nodes):
        yield f"{len(nodes) - len(shown)} more nodes are not shown; --json has all"


def _shown(nodes: Sequence[str], rows: Sequence[Row]) -> list[int]:
    """The columns that are shown: the first, those with the most that is bad or different, then the others in their order."""
    marks = [sum(row.is_marked[column] for row in rows) for column in range(len(nodes))]
    others = sorted(range(1, len(nodes)), key=lambda column: (-marks[column], column))
    return sorted([0, *others[: MAX_NODES - 1]])


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 3]}..."
