"""Rows of text as a table: for a terminal, for a notebook, for markdown."""

import html
from collections.abc import Sequence

Cells = Sequence[str]


def plain(columns: Cells, rows: Sequence[Cells]) -> str:
    """Columns padded with spaces, the headings underlined."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(columns: Cells, rows: Sequence[Cells]) -> str:
    """GitHub's tables."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))


def page(columns: Cells, rows: Sequence[Cells]) -> str:
    """An HTML table."""

    def line(cells: Cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(columns, "th") + "".join(line(cells, "td") for cells in rows) + "</table>"
