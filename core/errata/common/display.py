"""How objects show themselves: short on a line, a table in a notebook, a data frame for pandas."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from errata.errors import MissingExtraError

SHOWN = 20
"""Rows of a table that are shown; `to_frame()` has all."""


def visible(text: str) -> str:
    r"""Return text in which no character acts on a terminal or a page: control signs as \x1b.

    >>> print(visible("a" + chr(27) + "b"))
    a\x1bb
    """
    return "".join(
        ascii(sign)[1:-1] if unicodedata.category(sign)[0] == "C" else sign for sign in text
    )


def shortened(text: str, limit: int = 60) -> str:
    """Return text on one line of at most `limit` characters, every control sign visible."""
    line = visible(" ⏎ ".join(text.strip().splitlines()))
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def plural(number: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class Described:
    """An object that is told by a few facts: `name(first, second …)`, or a table of two columns.

    A class says in `_facts` what they are, as (name, text); a name of "" stands for itself.
    """

    def _facts(self) -> Iterable[tuple[str, str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        told = (f"{name} {text}" if name else text for name, text in self._facts())
        return f"{type(self).__name__}({', '.join(told)})"

    def __str__(self) -> str:
        return repr(self)

    def __rich_repr__(self) -> Iterable[Any]:
        return ((name, text) if name else text for name, text in self._facts())

    def _repr_html_(self) -> str:
        rows = [(name, text) for name, text in self._facts()]
        return _html(type(self).__name__, ("", ""), rows)


class Row(Protocol):
    """What a `ResultTable` holds."""

    def as_row(self) -> Mapping[str, Any]:
        """Return the cells by column: numbers, texts, None where there is nothing."""
        ...


RowType = TypeVar("RowType", bound=Row)


class ResultTable(list[RowType]):
    """A list of results that shows itself as a table; everything else is a list's.

    >>> from errata import Measurement
    >>> ResultTable([Measurement("ES", 0.5, 2, "counterfact: …")])
    metric  value  low  high  n  unit   protocol
    ES      0.5    –    –     2  share  counterfact: …
    """

    def to_frame(self) -> Any:
        """Return a pandas `DataFrame`, a row for each result.

        Raises `MissingExtraError` where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingExtraError("A data frame", "pandas", "notebook") from None
        return pandas.DataFrame([dict(item.as_row()) for item in self])

    def __repr__(self) -> str:
        columns, rows, more = self._cells()
        if not rows:
            return "[]"
        table = [list(columns), *rows]
        wide = [max(len(row[i]) for row in table) for i in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([*lines, *more])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        columns, rows, more = self._cells()
        return _html("", columns, rows) + "".join(f"<p>{html.escape(text)}</p>" for text in more)

    def _cells(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Return the columns that hold anything, the first rows, and a line about the others."""
        found = [item.as_row() for item in self[:SHOWN]]
        columns = [name for name in found[0]] if found else []
        rows = [[_cell(row.get(name)) for name in columns] for row in found]
        left = len(self) - len(found)
        return columns, rows, [f"… {left} more: to_frame() has all"] if left else []


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else shortened(str(value), 160)


def _html(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table; every text in it is shown as text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns) if any(columns) else ""
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left">{html.escape(visible(c))}</td>' for c in row)
        + "</tr>"
        for row in rows
    )
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    return f"<table>{caption}{f'<tr>{head}</tr>' if head else ''}{body}</table>"
