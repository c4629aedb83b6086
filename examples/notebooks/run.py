"""Run notebooks from the first cell to the last, and keep what they print in them.

    python examples/notebooks/run.py            # all of this folder

No kernel is needed: a notebook here is plain Python, each cell in the same namespace. A cell's
output is what it prints, and the value of its last expression.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def run(path: Path) -> list[str]:
    """Return the text output of every code cell."""
    space: dict[str, Any] = {"__name__": "__main__"}
    return [_output(code, space, f"{path.name}[{n}]") for n, code in enumerate(cells(path))]


def cells(path: Path) -> list[str]:
    """Return the source of every code cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def stored(path: Path) -> list[str]:
    """Return the text output of every code cell that the notebook holds."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = [c["outputs"] for c in notebook["cells"] if c["cell_type"] == "code"]
    return ["".join("".join(part["text"]) for part in outputs) for outputs in found]


def store(path: Path, outputs: list[str]) -> None:
    """Put outputs into a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(code, outputs, strict=True), 1):
        stream = {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
        cell["execution_count"] = number
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _output(code: str, space: dict[str, Any], name: str) -> str:
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, name, "exec"), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)
            if value is not None:
                print(repr(value) if not hasattr(value, "_repr_html_") else value)
    return out.getvalue()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for file in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        store(file, run(file))
        print(f"{file.name}: done")
