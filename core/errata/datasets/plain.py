"""Requests in errata's own schema: the fields of `errata.Request`, one JSON object a line."""

from __future__ import annotations

from typing import Any

from errata.datasets.reader import per_record
from errata.datasets.record import Record, is_missing
from errata.edits.request import Request
from errata.edits.subjects import subject_place

LISTS = tuple(name for name, field in Request.model_fields.items() if field.default == ())
"""Fields of a request that hold several texts or probes."""


def parse(record: Record) -> dict[str, Any]:
    """Return the fields of the request that a record is; the subject's place may be to find."""
    if not isinstance(record.data, dict):
        raise record.bad("", "is not an object with the fields of a request")
    # Tables have a column for every field of any row: null or NaN is one that this row has not.
    fields = {key: value for key, value in record.data.items() if not is_missing(value)}
    if record.cells:
        fields.update(_structured(record))
    prompt, subject = fields.get("prompt"), fields.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str):
        place = subject_place(prompt, subject)
        if (
            isinstance(place, tuple) and place[1] != subject.strip()
        ):  # in other upper and lower case
            fields["prompt"], fields["subject"] = place
    return fields


def _structured(record: Record) -> dict[str, Any]:
    """Return the list-valued fields of a table's row; a single text becomes a list of one."""
    lists = {name: [part.data for part in record.parts(name)] for name in LISTS if record.has(name)}
    objects = {name: record.get(name) for name in ("relation_view", "chat") if record.has(name)}
    return {**lists, **objects}


read = per_record(parse)
