"""What is wrong with a value that a user wrote, in words about the value, not about Python types.

Every place that reads what users write with pydantic says its findings in these words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator

from errata.common.display import shortened

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping of names to values",
    "mapping_type": "a mapping of names to values",
    "model_type": "a mapping of names to values",
    "model_attributes_type": "a mapping of names to values",
}
"""Type of pydantic's error → what the value must be."""


class NumbersAreNumbers(BaseModel):
    """A base of what users write: no truth value stands for a number, as true would for 1."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if any(isinstance(item, bool) for item in _flat(value)):
            kinds = _kinds(cls, info.field_name or "")
            if {int, float} & kinds and not {bool, Any} & kinds:
                raise ValueError(f"must be a number, not {_shown(value)}")
        return value


def _kinds(model: type[BaseModel], field: str) -> frozenset[Any]:
    """Return every type that a field's annotation names."""
    return frozenset(_named(model.model_fields[field].annotation))


def _named(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, bool):  # of a Literal
        yield bool
    elif isinstance(annotation, type) or annotation is Any:
        yield annotation
    for part in get_args(annotation):
        yield from _named(part)


def _flat(value: Any) -> Iterator[Any]:
    """Yield a value, or those in it where it holds several."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def problems_by_place(error: ValidationError) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Yield (place, value, what is wrong), one for each place.

    For a value that may be of several kinds pydantic gives one problem for each kind.
    """
    found: dict[tuple[str, ...], tuple[Any, list[str]]] = {}
    for item in error.errors():
        whole = tuple(map(str, item["loc"]))
        place = whole[:1] + tuple(part for part in whole[1:] if not _BRANCH.match(part))
        missing = item["type"] == "missing"
        said = "has none, and must be given" if missing else problem_of(item, given=False)
        found.setdefault(place, (_NOTHING if missing else item.get("input"), []))[1].append(said)
    for place, (value, told) in found.items():
        wanted = [text.removeprefix("must be ") for text in told]
        several = len(told) > 1 and all(text.startswith("must be ") for text in told)
        yield place, value, f"must be {' or '.join(wanted)}" if several else "; ".join(told)


_NOTHING = type("Nothing", (), {"__repr__": lambda _: "nothing"})()
"""Stands for a value that is missing."""


_BRANCH = re.compile(r"(int|float|str|bool|constrained-\w+)$|\w+(-\w+)?\[|function-")
"""A part of an error's place that names a kind out of several, not a key of the user's."""


def problem_of(item: Mapping[str, Any], given: bool = True) -> str:
    """Return what is wrong with one value: an item of `ValidationError.errors()`, without its name.

    Without `given` the value is left out, where the place says it already.

    >>> problem_of({"type": "tuple_type", "input": "text", "msg": "Input should be a valid tuple"})
    "must be a list, not 'text'"
    """
    kind, value, context = item["type"], item.get("input"), item.get("ctx", {})
    instead = f", not {_shown(value)}" if given else ""
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "there is no such key"
    if kind in _WANTED:
        said = f"must be {_WANTED[kind]}{instead}"
        quotes = _QUOTES.get(type(value), "") if kind == "string_type" else ""
        return f"{said}: {quotes}" if quotes else said
    if kind == "string_too_short" and context.get("min_length") == 1:
        return "is empty"
    if kind in ("too_short", "string_too_short"):
        least = context.get("min_length", 1)
        return "is empty: give at least one" if least == 1 else f"needs at least {least}"
    if kind in ("too_long", "string_too_long"):
        return f"holds more than {context.get('max_length')}"
    said = str(item["msg"]).removeprefix("Value error, ")
    if said.startswith("Input should be "):
        return f"must be {said.removeprefix('Input should be ')}{instead}"
    return said


def kind_of(value: object) -> str:
    """Return what plain data is, in a word: "a list", "a number", "nothing"."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"


_QUOTES: dict[type, str] = {
    bool: "put it in quotes (YAML reads a bare no, off, yes or on as a truth value)",
    int: "put it in quotes",
    float: "put it in quotes",
    type(None): "write a text, in quotes where it looks like nothing (null, ~)",
}


def _shown(value: object) -> str:
    try:
        return shortened(repr(value))
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a {type(value).__name__} of more digits than can be shown"
