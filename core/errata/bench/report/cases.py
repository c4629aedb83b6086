"""Every case with what the model said before and after: the data of the page's browser.

Texts repeat (prompts, expected answers, what the base said), so each stands once in a list and is
named by its place: a page with thousands of cases stays small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.bench.report.errors_and_costs import title_of
from errata.bench.report.grouping import MOMENTS
from errata.bench.report.tables import MOMENT_NAMES
from errata.evaluate.matching import contained_match

if TYPE_CHECKING:
    from errata.bench.report.grouping import Column, Section
    from errata.bench.report.reading import ResultEntry
    from errata.contract.measurement import Answer

ORDER = {"": 0, "immediate": 1, "final": 2}


class _UniqueList:
    """A list without repetitions that tells where something stands in it."""

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return self._places.setdefault(thing, len(self._places))

    def list(self) -> list[Any]:
        return list(self._places)


def browser(sections: Sequence[Section], limit: int | None = None) -> dict[str, Any]:
    """Return the browser's data: lists of texts, and rows of places in them.

    Args:
        sections: whose cases.
        limit: at most so many cases per section; `left_out` counts the rest.
    """
    texts, expected, metrics, errors = _UniqueList(), _UniqueList(), _UniqueList(), _UniqueList()
    columns, moments, types = _UniqueList(), _UniqueList(), _UniqueList()
    errors("")
    rows: list[list[Any]] = []
    left_out = 0
    for number, section in enumerate(sections):
        before = _base_texts(section)
        shown: dict[str, int] = {}
        for column, moment, entry in _in_order(section):
            case = entry.case_id or ""
            place = shown.setdefault(case, len(shown))
            if limit is not None and place >= limit:
                continue
            answers = [
                [
                    texts(answer.prompt),
                    expected(tuple(answer.expected)),
                    metrics(answer.metric),
                    types(answer.type),
                    _place_of(texts, before.get((case, answer.prompt))),
                    texts(answer.text),
                    _verdict(answer),
                    errors(answer.error),
                ]
                for answer in entry.answers
            ]
            values = [
                [metrics(one.metric), _short(one.value)]
                for one in entry.measurements
                if math.isfinite(one.value)
            ]
            rows.append(
                [
                    number,
                    columns((column.label, section.columns.index(column))),
                    moments(MOMENT_NAMES[moment]),
                    entry.seed,
                    texts(case),
                    texts(title_of(entry)),
                    _place_of(texts, entry.error or entry.refused or None),
                    int(entry.kind == "failure"),
                    entry.step,
                    answers,
                    values,
                ]
            )
        left_out += max(0, len(shown) - (limit if limit is not None else len(shown)))
    return {
        "sections": [section.title for section in sections],
        "columns": [list(one) for one in columns.list()],  # label, place in its section
        "moments": moments.list(),
        "metrics": metrics.list(),
        "errors": errors.list(),
        "types": types.list(),
        "expected": [[texts(one) for one in many] for many in expected.list()],
        "texts": texts.list(),
        "rows": rows,
        "left_out": left_out,
    }


def _in_order(section: Section) -> list[tuple[Column, str, ResultEntry]]:
    """Return what was measured, a case's variants side by side, in the order of the stream."""
    found: list[tuple[Column, str, ResultEntry]] = []
    for column in section.edited:
        for moment in section.moments:
            found += [(column, moment, entry) for entry in column.at(moment)]
        found += [
            (column, MOMENTS.get(entry.stage, ""), entry)
            for entry in column.entries
            if entry.kind == "failure"
        ]
    first: dict[str | None, int] = {}
    for _, _, entry in found:
        first[entry.case_id] = min(entry.index, first.get(entry.case_id, entry.index))
    places = {column.label: place for place, column in enumerate(section.columns)}
    return sorted(
        found,
        key=lambda item: (
            first[item[2].case_id],
            item[2].case_id or "",
            places[item[0].label],
            item[2].seed,
            ORDER[item[1]],
        ),
    )


def _base_texts(section: Section) -> Mapping[tuple[str, str], str]:
    return {
        (entry.case_id or "", answer.prompt): answer.text
        for column in section.columns
        if column.is_base
        for entry in column.entries
        for answer in entry.answers
    }


def _verdict(answer: Answer) -> int:
    """Return 2 for a right answer, 1 for one that holds it among other words, 0 for another."""
    if answer.right:
        return 2
    return int(answer.metric.endswith("_exact") and contained_match(answer.text, answer.expected))


def _place_of(places: _UniqueList, text: str | None) -> int:
    return -1 if text is None else places(text)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def safe_json(data: Any) -> str:
    """Return JSON that can stand inside a script element: nothing in it ends or opens a tag."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
