"""Files of measured rows, a line of JSON each: what is there is not measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none where there is no file yet."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to the file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
