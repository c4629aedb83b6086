"""Requests in errata's own schema: the fields of `errata.Request`, one JSON object a line."""

from __future__ import annotations

from errata.datasets.reader import per_record
from errata.datasets.record import Record
from errata.edits.request import Request
from errata.errors import RequestError


def parse(record: Record) -> Request:
    """Return the request that a record is; the subject's place may be left to find."""
    if not isinstance(record.data, dict):
        raise record.bad("", "is not an object with the fields of a request")
    # Tables have a column for every field of any row: null is one that this row has not.
    fields = {key: value for key, value in record.data.items() if value is not None}
    try:
        return Request.parse(fields)
    except RequestError as error:
        raise record.bad("", str(error)) from None


read = per_record(parse)
