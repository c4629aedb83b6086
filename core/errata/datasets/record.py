"""One record of a dataset file: its fields, checked as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from errata.common.value_problems import problem_of
from errata.datasets.cells import decoded, is_json
from errata.edits.request import Probe, Request
from errata.edits.subjects import subject_place
from errata.errors import DatasetError


@dataclass(frozen=True)
class Record:
    """A record and where it stands, so that whatever is wrong with it can be named.

    Fields are named with dots ("requested_rewrite.target_new.str"). A field that is null or NaN
    counts as missing: so tables write a record that lacks a column.
    """

    data: Any
    file: str
    index: int
    at: str = ""
    """Field of the file's record that this one is a part of."""
    cells: bool = False
    """Whether its values are cells of text, in which a list or an object is JSON."""
    note: Callable[[str], None] = field(default=lambda text: None, repr=False, compare=False)
    """What to tell of texts that lose white space."""

    @property
    def where(self) -> str:
        """The file and the record's place in it, as errors name them."""
        return f"{self.file}, record {self.index} (counted from 0)"

    @property
    def digest(self) -> str:
        """SHA-256 of what the record holds."""
        text = json.dumps(self.data, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def bad(self, field: str, problem: str) -> DatasetError:
        """Return the error for a field of this record."""
        path = ".".join(part for part in (self.at, field) if part)
        return DatasetError(problem, file=self.file, index=self.index, field=path)

    def get(self, field: str) -> Any:
        """Return what a field holds, None where it is missing; "" is the record itself.

        A table's cell that is a list or an object in JSON is returned as such.
        """
        found = self.data
        for key in field.split(".") if field else ():
            found = found.get(key) if isinstance(found, Mapping) else None
            found = decoded(found) if self.cells else found
        return None if is_missing(found) else found

    def has(self, *fields: str) -> bool:
        """Say whether all these fields are there."""
        return all(self.get(field) is not None for field in fields)

    def required(self, field: str) -> Any:
        """Return what a field holds; raise where it is missing."""
        found = self.get(field)
        if found is None:
            if not isinstance(self.data, Mapping):
                raise self.bad("", f"is {_kind(self.data)}, not an object with fields")
            parent = field.rpartition(".")[0]
            while not isinstance(self.get(parent), Mapping):  # the record itself is one
                parent = parent.rpartition(".")[0]
            here = ", ".join(map(str, list(self.get(parent))[:12])) or "none"
            what = repr(parent) if parent else "the record"
            raise self.bad(field, f"missing ({what} has the fields {here})")
        return found

    def text(self, field: str) -> str:
        """Return a text without outer white space; raise where it is missing or empty.

        A number is its digits; a whole one has no decimal point, whatever its column makes it.
        """
        found = self.required(field)
        if self.cells:  # a text may look like JSON
            found = self.data.get(field, found)
        if is_number(found):
            return as_text(found)
        if not isinstance(found, str):
            raise self.bad(field, f"is {_kind(found)}, not a text")
        if not found.strip():
            raise self.bad(field, "is empty")
        return found.strip()

    def optional_text(self, field: str) -> str | None:
        """Return a text, None where it is missing or empty."""
        found = self.get(field)
        if found is None or (isinstance(found, str) and not found.strip()):
            return None
        return self.text(field)

    def texts(self, field: str) -> tuple[str, ...]:
        """Return the texts of a list (or the one that stands there), without empty ones."""
        found = self.get(field)
        if isinstance(found, list) and all(type(item) is str for item in found):
            return tuple(text for item in found if (text := item.strip()))
        return tuple(
            part.text("")
            for part in self.parts(field)
            if not (isinstance(part.data, str) and not part.data.strip())
        )

    def answers(self, field: str) -> tuple[str, ...]:
        """Return every accepted form of an answer, in order, each once.

        A text, a list of aliases, or a list of alias lists (one per answer of a question that has
        several): the lists are kept whole, one after the other.
        """
        return tuple(dict.fromkeys(self._flat(self.get(field), field)))

    def parts(self, field: str) -> Iterator[Record]:
        """Yield the items of a list as records of their own; one value counts as a list of one."""
        found = self.get(field)
        if found is None:
            return
        if self.cells and isinstance(found, str) and is_json(found):
            raise self.bad(field, "begins as a list or an object in JSON does, and is none")
        if not isinstance(found, list):
            yield self.part(found, field)
            return
        for place, item in enumerate(found):
            yield self.part(item, f"{field}[{place}]")

    def part(self, data: Any, field: str) -> Record:
        """Return a value of this record as a record whose errors name its place."""
        at = ".".join(name for name in (self.at, field) if name)
        return Record(data, self.file, self.index, at, note=self.note)

    def place(self, prompt_field: str, subject: str) -> tuple[str, str]:
        """Return the prompt as a template, and the subject as it stands in the prompt.

        Raises where the subject's place is missing or could be one of several.
        """
        prompt = self.text(prompt_field)
        found = subject_place(prompt, subject)
        if isinstance(found, str):
            raise self.bad(prompt_field, f"{found} (subject {subject!r}, prompt {prompt!r})")
        return found

    def request(self, **fields: Any) -> Request:
        """Return a request; raise a `DatasetError` naming the first field that is not allowed."""
        try:
            return Request(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(key) for key in first["loc"])
            raise self.bad(field, f"not a valid request: {problem_of(first)}") from None

    def _flat(self, value: Any, field: str) -> Iterator[str]:
        if is_missing(value):
            return
        if isinstance(value, str):
            if value.strip():
                yield value.strip()
        elif is_number(value):
            yield as_text(value)
        elif isinstance(value, list):
            for item in value:
                yield from self._flat(item, field)
        else:
            raise self.bad(field, f"holds {_kind(value)} where a text is expected")


def is_missing(value: Any) -> bool:
    """Return whether a value says that there is none: null, NaN, and what pandas has for them."""
    if value is None:
        return True
    if isinstance(value, numbers.Real):
        return value != value  # NaN alone
    return type(value).__name__ in ("NAType", "NaTType")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; true and false are none."""
    real = type(value) is not bool and isinstance(value, numbers.Real)
    return real and abs(value) < math.inf


def as_text(number: Any) -> str:
    """Return the digits of a number.

    >>> as_text(3.0), as_text(2.5)
    ('3', '2.5')
    """
    # A column of whole numbers becomes one of floats where a value is missing.
    return str(int(number)) if number == int(number) else str(number)


def probes(prompts: Iterable[str], answers: tuple[str, ...], kind: str = "") -> tuple[Probe, ...]:
    """Return a probe for each prompt, all with the same answers."""
    return tuple(Probe(prompt=prompt, answers=answers, type=kind) for prompt in prompts)


def without(aliases: Iterable[str], target: str) -> tuple[str, ...]:
    """Return the aliases that differ from the target itself, each once."""
    return tuple(alias for alias in dict.fromkeys(aliases) if alias != target)


def _kind(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "infinite"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if is_missing(value) else f"a {type(value).__name__}")
