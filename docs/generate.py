"""Writes docs/python.md from the docstrings of the Python interface: `python docs/generate.py`.

A test compares the page with what this makes, and runs its examples.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import errata
from errata import errors
from errata.common.display import ResultTable
from errata.edits.edit import LogEntry
from errata.edits.outcome import Outcome
from errata.edits.request import RelationView

PAGE = Path(__file__).with_name("python.md")

TOUR = """\
# The Python interface

Generated from the docstrings by `python docs/generate.py`; a test compares the two and runs the
examples. For the command line see [cli.md](cli.md), for methods of your own [plugin.md](plugin.md).

```python
>>> import errata
>>> editor = errata.Editor("atlas-gpt2")
>>> fact = errata.Request(
...     prompt="The instrument of {} is",
...     subject="Oswin Galdor",
...     target_new="piano",
...     target_true="lute",
... )
>>> edit = editor.edit(fact, method="rome")
>>> edit.outcome.efficacy.value, edit.config["layer"]
(1.0, 1)
>>> editor.generate(fact.text)
' piano. ...'
>>> with editor.disabled():
...     editor.generate(fact.text)
' lute. ...'
>>> [(entry.edit.id == edit.id, entry.active) for entry in editor.log()]
[(True, True)]

```

Hyper-parameters go beside the request, or as `config={…}`; `errata methods rome` lists them.
`configure` says what they are for this model, and what set each:

```python
>>> settings, where = editor.configure("rome", {"steps": 10})
>>> settings.steps
10

```

`evaluate` and `log` return lists that print as tables, and turn into data frames with `to_frame()`
(`pip install 'errata[notebook]'`). Every number names its protocol:

```python
>>> found = editor.evaluate([fact], protocols=["generation"])
>>> found[0].metric, found[0].value, found[0].n
('rewrite_exact', 1.0, 1)
>>> found[0].protocol.partition(":")[0]
'generation'

```

Reverting leaves the model bit for bit as it was; `verify` returns what is not as it should be:

```python
>>> _ = editor.revert(edit)
>>> editor.verify()
[]

```

Errors are errata's own, and also `ValueError`, `LookupError` and so on:

```python
>>> editor.edit(fact, method="rmoe")
Traceback (most recent call last):
    ...
errata.errors.UnknownNameError: Unknown method 'rmoe'. Did you mean 'rome'? Known: ...
>>> editor.close()

```
"""

METHODS = (
    "edit", "revert", "apply", "rebase", "resolve", "log", "disabled", "only", "verify", "refresh",
    "generate", "evaluate", "locate", "configure", "prepare", "export", "import_", "merge", "close",
)  # fmt: skip
SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):")
ENTRY = re.compile(r"(?P<name>\*{0,2}\w+(?:, \*{0,2}\w+)*): (?P<text>.*)")


def page() -> str:
    """Return the whole page."""
    blocks = [TOUR, "## Editor\n", *_object(errata.Editor, "errata.Editor")]
    for name in METHODS:
        function = getattr(errata.Editor, name)
        blocks += [f"### editor.{name}\n", *_object(function, f"editor.{name}")]
    blocks += ["## Request\n", *_model(errata.Request)]
    blocks += ["### Probe\n", *_model(errata.Probe), "### RelationView\n", *_model(RelationView)]
    blocks += ["## Results\n", "### Edit\n", *_model(errata.Edit), *_properties(errata.Edit)]
    blocks += ["### Outcome\n", *_model(Outcome, nested=True)]
    for kind in (LogEntry, errata.Location, errata.Measurement):
        blocks += [f"### {kind.__name__}\n", *_text(_prose(kind)), *_properties(kind)]
    blocks += ["### ResultTable\n", *_text(_prose(ResultTable)), *_properties(ResultTable)]
    blocks += ["## Errors\n", *_errors()]
    return "\n".join(blocks).rstrip() + "\n"


# -- classes and functions -------------------------------------------------------------------------


def _object(thing: Any, name: str) -> list[str]:
    return [f"```python\n{name}{_signature(thing)}\n```\n", *_text(_prose(thing))]


def _signature(thing: Any) -> str:
    """Return a signature, an argument a line where there are many."""
    parts = []
    star = False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star |= parameter.kind is parameter.VAR_POSITIONAL
        parts.append(_argument(parameter))
    back = inspect.signature(thing).return_annotation
    told = "" if inspect.isclass(thing) or back is inspect.Signature.empty else f" -> {back}"
    line = f"({', '.join(parts)}){told}"
    for alias, meaning in (
        ("EditsLike", "EditLike | Iterable[EditLike]"),
        ("EditLike", "Edit | str"),
    ):
        parts = [part.replace(alias, meaning) for part in parts]
        line = line.replace(alias, meaning)
    whole = "".join(f"    {part},\n" for part in parts)
    return line if len(line) < 80 else f"(\n{whole}){told}"


def _argument(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = parameter.annotation
    text = f"{stars}{parameter.name}" + ("" if kind is parameter.empty else f": {kind}")
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def _prose(thing: Any) -> str:
    """Return a docstring without its examples: those of the page stand at its top."""
    lines = inspect.cleandoc(thing.__doc__ or "").splitlines()
    kept: list[str] = []
    example = False
    for line in lines:
        example = line.startswith(">>>") or (example and bool(line.strip()))
        if not example:
            kept.append(line)
    return "\n".join(kept)


def _text(docstring: str) -> list[str]:
    """Return a docstring as Markdown: its sections become tables and lists."""
    blocks: list[str] = []
    lines: list[str] = []
    section = ""
    for line in [*docstring.splitlines(), "Returns:"]:  # the last one closes what is open
        head = SECTION.fullmatch(line)
        if section and line and not line.startswith(" ") and head is None:
            blocks.append(_section(section, inspect.cleandoc("\n".join(lines)).strip()))
            section, lines = "", []  # a paragraph after a section
        if head is None:
            lines.append(line)
            continue
        body = inspect.cleandoc("\n".join(lines)).strip()
        if body:
            blocks.append(_section(section, body))
        section, lines = head[1], []
    return blocks


def _section(name: str, body: str) -> str:
    if name in ("Args", "Attributes"):
        title = "argument" if name == "Args" else "attribute"
        return _table((title, ""), _entries(body))
    words = " ".join(body.split())
    if name == "Raises":
        words = re.sub(r"\b(\w+(?:Error|Refused)(?:, \w+Error)*): ", r"`\1`: ", words)
    return f"{f'**{name}** ' if name else ''}{words if name else _paragraphs(body)}\n"


def _paragraphs(body: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in body.split("\n\n"))


def _entries(body: str) -> Iterable[tuple[str, str]]:
    entries: list[list[str]] = []
    for line in body.splitlines():
        found = ENTRY.fullmatch(line)
        if found:
            entries.append([found["name"], found["text"]])
        elif entries:
            entries[-1][1] += f" {line.strip()}"
    return [(", ".join(f"`{n}`" for n in name.split(", ")), text) for name, text in entries]


def _properties(kind: type) -> list[str]:
    """Return a table of a class's own public properties and methods."""
    rows = []
    for name, value in vars(kind).items():
        if name.startswith("_") or name in ("model_config", "as_row", "of"):
            continue
        called = value.__func__ if isinstance(value, classmethod) else value
        if not (isinstance(value, property) or inspect.isfunction(called)):
            continue
        first = _prose(called).split("\n\n")[0]
        shown = name if isinstance(value, property) else f"{name}()"
        rows.append((f"`{shown}`", " ".join(first.split())))
    return [_table(("also", ""), rows)] if rows else []


# -- models and errors -----------------------------------------------------------------------------


def _model(kind: type[BaseModel], nested: bool = False) -> list[str]:
    rows = []
    for name, field in kind.model_fields.items():
        text = field.description or ""
        inner = [arg for arg in getattr(field.annotation, "__args__", ()) if _is_model(arg)]
        if nested and inner:
            fields = ", ".join(f"`{n}`" for n in inner[0].model_fields)
            text = f"{(inner[0].__doc__ or '').strip().splitlines()[0]} Fields: {fields}."
        rows.append((f"`{name}`", f"`{_type(kind, name)}`", _default(field), text))
    return [*_text(_prose(kind)), _table(("field", "type", "default", ""), rows)]


def _is_model(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _type(kind: type[BaseModel], name: str) -> str:
    owner = next(k for k in kind.__mro__ if name in vars(k).get("__annotations__", {}))
    return str(owner.__annotations__[name]).replace("Kind", "str", 1)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        return "made"
    return f"`{field.default!r}`"


def _errors() -> list[str]:
    rows = []
    for name, kind in vars(errors).items():
        if not (inspect.isclass(kind) and issubclass(kind, errors.ErrataError)):
            continue
        bases = [f"`{base.__name__}`" for base in kind.__bases__ if base is not Exception]
        first = _prose(kind).split("\n\n")[0]
        rows.append((f"`{name}`", ", ".join(bases) or "`Exception`", " ".join(first.split())))
    return [
        "All are in `errata.errors`. Catch `errata.ErrataError` for all of them.\n",
        _table(("error", "is also", ""), rows),
    ]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
