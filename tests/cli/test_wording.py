"""Messages speak of the interface that was used: arguments in Python, options in a shell."""

from __future__ import annotations

import ast
import re
from functools import cache

from errata.cli.wording import WORDS, in_options
from tests.test_boundaries import SOURCES, tree_of

PYTHON = re.compile(
    r"(?<!--set )\b\w+=(?:True|False|None|…)(?!\w)"  # an argument
    r"|(?:^|[ (`.])(?!P\()[A-Za-z_.]*[a-z_]{2,}\((?![ )s])[^)]*\)"  # a call
    r"|(?:^|[ `])[a-z_.]+\(\)"
)
PYTHON_ONLY = (
    # What the command line has no way to ask for.
    "list(errata.datasets.load(", "Editor(…, branch=True)", "disabled() or only()",
    "ledger.delta(id)", "Baseline.capture(", "model.base_state()", "get_output_embeddings()",
    "corpus=[document, …]", "Editor(model, tokenizer)",
    "module.resize_token_embeddings(len(tokenizer))", "torch.inference_mode()",
    "editor.model.stack.restore()",
)  # fmt: skip


@cache
def messages() -> list[tuple[str, str]]:
    """Return (place, text) of every message of an error or a warning of the library."""
    found = []
    for path in SOURCES:
        if "cli" in path.parts or "testing" in path.parts:
            continue
        for node in ast.walk(tree_of(path)):
            called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            warns = called in ("warning", "__init__")
            if not (isinstance(node, ast.Raise) or warns):
                continue
            inner = {v for j in ast.walk(node) if isinstance(j, ast.JoinedStr) for v in j.values}
            for part in ast.walk(node):
                if part in inner:
                    continue
                if isinstance(part, ast.JoinedStr):
                    text = "".join(
                        v.value if isinstance(v, ast.Constant) else "VALUE" for v in part.values
                    )
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    text = part.value
                else:
                    continue
                found.append((f"{path.name}:{part.lineno}", text))
    return found


def test_what_reaches_a_shell_speaks_of_options() -> None:
    wrong = []
    for place, text in messages():
        said = in_options(text)
        for allowed in PYTHON_ONLY:
            said = said.replace(allowed, "")
        if PYTHON.search(said):
            wrong.append((place, said))
    assert wrong == []


def test_no_translation_is_left_over() -> None:
    texts = [text for _, text in messages()]
    assert [p for p, _ in WORDS if not any(re.search(p, text) for text in texts)] == []


def test_values_that_users_gave_stay_as_they_are() -> None:
    assert in_options("Unknown model 'x=True'.") == "Unknown model 'x=True'."
    assert in_options("Give better facts, or known_only=False.") == (
        "Give better facts, or --set known_only=False."
    )
