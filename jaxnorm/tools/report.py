"""What a tool did, as a table."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxnorm import tabular


@dataclass(frozen=True)
class Report:
    """A table: prints, shows itself in a notebook, and gives its rows to programs.

    Args:
        title: one line, with the count of what was done.
        columns: the names of the columns.
        rows: one mapping a line; a column that it lacks stays empty.

    Example:
        >>> from jaxnorm.tools.report import Report
        >>> report = Report("1 of 2 folded", ["norm", "into"], [{"norm": "bn", "into": "conv"}, {"norm": "ln"}])
        >>> print(report)
        1 of 2 folded
        norm  into
        ----  ----
        bn    conv
        ln
        >>> report.to_dict()
        {'norm': ['bn', 'ln'], 'into': ['conv', None]}
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.title}\n{tabular.plain(self.columns, self._cells())}" if self.rows else self.title

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def _cells(self) -> list[list[str]]:
        return [[_text(row.get(column)) for column in self.columns] for row in self.rows]

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.title)}</p>" + tabular.page(self.columns, self._cells())

    def to_dict(self) -> dict[str, list[Any]]:
        """The columns, as lists."""
        return {column: [row.get(column) for row in self.rows] for column in self.columns}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
