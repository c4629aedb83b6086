"""Tables of text: CSV and TSV files read row by row, each cell as the text that stands in it.

Nothing is guessed from what a column holds: 1984 stays "1984", 001 stays "001" and NA stays "NA".
A reader that wants a list or an object takes it as JSON from the cell.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.datasets.streams import LONGEST, opened
from errata.errors import DatasetError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = re.compile(r"\s*(\[|\{\s*\")")
"""How a list or an object begins; "{}" is the place of a subject."""


def suffix_of(path: str | Path) -> str:
    """Return the ending that says what a file holds; that of a gzip file is left off before."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


def read_cells(path: Path, name: str = "") -> Iterator[dict[str, str | None]]:
    """Yield the rows of a CSV or TSV file by column name; a blank cell is None.

    The first row names the columns; one without a name is left out. UTF-8 with or without a byte
    order mark, plain or gzip.

    Raises:
        DatasetError: the file is empty, cut off or not text, or a row has more or fewer cells than
            the first; says where.
    """
    name = name or str(path)
    # A limit of the process. The module's own is shorter than many a court opinion.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    delimiter = DELIMITERS[suffix_of(path)]
    with opened(path, name) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            columns = _columns(next(rows, []), delimiter, name)
            index = 0
            for row in rows:
                if not row:  # an empty line
                    continue
                if len(row) != len(columns):
                    raise DatasetError(
                        f"damaged at line {rows.line_num}: {len(row)} cells, and the first row "
                        f"names {len(columns)} columns (a cell that holds {delimiter!r} needs "
                        "quotes)",
                        file=name,
                        index=index,
                    )
                cells = zip(columns, row, strict=True)
                yield {key: cell if cell.strip() else None for key, cell in cells if key}
                index += 1
        except csv.Error as error:
            raise DatasetError(f"damaged at line {rows.line_num}: {error}", file=name) from error
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"not UTF-8 ({error.reason}) after line {rows.line_num}: save the file as UTF-8",
                file=name,
            ) from error
        except (EOFError, zlib.error) as error:
            raise DatasetError(f"the gzip stream is broken ({error})", file=name) from error


def is_json(cell: str) -> bool:
    """Say whether a cell begins as a JSON list or object does."""
    return _JSON.match(cell) is not None


def decoded(cell: Any) -> Any:
    """Return the list or object that a cell holds as JSON; all else as it is."""
    if not isinstance(cell, str) or not is_json(cell):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _columns(first: list[str], delimiter: str, name: str) -> list[str]:
    columns = [column.strip() for column in first]
    if not any(columns):
        raise DatasetError("its first row names no columns", file=name)
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice is not None:
        raise DatasetError(f"its first row names the column {twice!r} twice", file=name)
    if len(columns) == 1 and ";" in columns[0]:
        raise DatasetError(
            f"its columns are separated by ';', not by {delimiter!r}: save it with the latter",
            file=name,
        )
    return columns
