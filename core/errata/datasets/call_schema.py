"""Requests written as the arguments of one call: an object of parallel lists, as EasyEdit has it.

Its `edit(prompts=…, target_new=…, subject=…)` takes them so. Entry i of every list belongs to
request i. What the lists hold is read as the flat schema's fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from errata.datasets.reader import Item, Parse, Read, parsed
from errata.datasets.record import Record, is_missing
from errata.datasets.source import Source
from errata.errors import DatasetError

LISTS = {
    "prompts": "prompt",
    "subject": "subject",
    "target_new": "target_new",
    "ground_truth": "ground_truth",
    "rephrase_prompts": "rephrase_prompt",
}
"""Argument of the call → field of a flat record."""
PROBES = {"locality_inputs": "locality", "portability_inputs": "portability"}
"""Arguments that hold {name: {"prompt": [...], "ground_truth": [...]}}."""


def per_call_record(parse: Parse) -> Read:
    """Return a `read` for files of records, or of calls that hold several records."""

    def read(source: Source, **options: Any) -> Iterator[Item]:
        for record in records_of_calls(source):
            if isinstance(record, DatasetError):
                yield record
            else:
                yield from parsed(record, parse, **options)

    return read


def records_of_calls(source: Source) -> Iterator[Record | DatasetError]:
    """Yield the records of a source; of a call, those that its lists hold, or what is wrong."""
    index = 0
    for record in source.records():
        if not is_call(record):
            yield record
            continue
        try:
            fields, count = _fields(record)
        except DatasetError as error:
            yield error
            continue
        left = [key for key in record.data if key not in {*LISTS, *PROBES}]
        if left:
            source.remark(f"not read, as errata has no use for it: {', '.join(map(str, left))}")
        for place in range(count):
            data = {field: _at(values, place) for field, values in fields.items()}
            yield Record(data, record.file, index)
            index += 1


def is_call(record: Record) -> bool:
    """Say whether a record is an object of parallel lists."""
    return isinstance(record.data, Mapping) and record.has("prompts") and not record.has("prompt")


def _fields(record: Record) -> tuple[dict[str, Any], int]:
    """Return the flat fields with the list of each, and how many records they make."""
    one = isinstance(record.get("prompts"), str)
    count = 1 if one else len(record.get("prompts"))

    def listed(field: str) -> list[Any]:
        found = record.get(field)
        if one and not (isinstance(found, list) and len(found) == 1):
            return [found]
        if not isinstance(found, list) or len(found) != count:
            held = f"{len(found)} entries" if isinstance(found, list) else "one value"
            raise record.bad(
                field, f"holds {held}, prompts {count}: give one for each prompt, in its order"
            )
        return found

    fields: dict[str, Any] = {field: listed(key) for key, field in LISTS.items() if record.has(key)}
    for key, field in PROBES.items():
        found = record.get(key)
        if found is None:
            continue
        if not isinstance(found, Mapping) or not all(
            isinstance(v, Mapping) for v in found.values()
        ):
            raise record.bad(key, 'must be an object {name: {"prompt": […], "ground_truth": […]}}')
        fields[field] = {
            name: {part: listed(f"{key}.{name}.{part}") for part in ("prompt", "ground_truth")
                   if record.has(f"{key}.{name}.{part}")}
            for name in found
        }  # fmt: skip
    return fields, count


def _at(values: Any, place: int) -> Any:
    """Return what belongs to one record; a probe that it lacks is left out."""
    if isinstance(values, list):
        return values[place]
    probes = {name: {part: v[place] for part, v in parts.items()} for name, parts in values.items()}
    return {name: probe for name, probe in probes.items() if not is_missing(probe.get("prompt"))}
