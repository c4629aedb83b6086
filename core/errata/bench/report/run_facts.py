"""What a report says about its runs: what was run, on what, and what to know before reading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.cli.render import count

if TYPE_CHECKING:
    from errata.bench.report.contents import Part, ReportContents
    from errata.bench.report.errors_and_costs import Incident
    from errata.bench.report.reading import RunResults


def warnings(report: ReportContents) -> list[str]:
    """Return what a reader has to know before believing the numbers."""
    said = [f"{one.run}: {one}." for one in report.progress if not one.is_complete]
    for run in report.runs:
        if run.cut_off:
            said.append(
                f"{run.name}: the last line of results is half written (the run goes on, or was "
                "killed); it is left out."
            )
        if run.damaged:
            lines = "; ".join(run.damaged[:5]) + ("; …" if len(run.damaged) > 5 else "")
            said.append(f"{run.name}: {count(len(run.damaged), 'damaged line')} left out: {lines}.")
    for part in report.parts:
        for found, what, then in (
            (part.failures, "failed", ": what failed in a column is missing from its numbers"),
            (part.refusals, "refused by a guard", ""),
        ):
            if found:
                said.append(f"{part.section.title}: {counted(found, what)}{then} (listed below).")
    return said


def counted(found: Sequence[Incident], what: str) -> str:
    """Return how many cases failed or were refused, and in how many columns.

    A case counts once, however many columns and seeds it is about.
    """
    cases = {one.case_id for one in found if one.case_id}
    texts = [f"{count(len(cases), 'case')} {what}"] if cases else []
    whole = {(one.label, one.seed, one.step) for one in found if not one.case_id}
    if whole:
        texts.append(f"{count(len(whole), 'measurement')} of the model as a whole {what}")
    columns = count(len({one.label for one in found}), "column")
    return f"{' and '.join(texts)}, in {columns}"


def unmatched(part: Part) -> str:
    """Say so when the columns were not measured on the same cases; "" when they were."""
    columns = part.section.edited
    if len({column.case_ids for column in columns}) < 2:
        return ""
    listed = ", ".join(f"{column.label} {column.cases}" for column in columns)
    shared = frozenset.intersection(*(one.case_ids for one in columns if one.cases))
    return (
        f"The columns cover different cases: {listed}; all of them have {len(shared)}. Which one "
        "is the best goes by these."
    )


def facts_of(run: RunResults) -> list[tuple[str, str]]:
    """Return what was run, as (name, value)."""
    info = run.info
    model: Mapping[str, Any] = info.get("model") or {}
    rows = [
        ("run", run.name),
        ("model", _model(model)),
        *(("dataset", _dataset(one)) for one in info.get("datasets") or ()),
        ("variants", ", ".join(str(v.get("label")) for v in info.get("variants") or ())),
        ("regimes", ", ".join(dict.fromkeys(e.regime for e in run.entries if not e.is_base))),
        ("protocols", ", ".join(map(str, info.get("protocols") or ()))),
        ("seeds", ", ".join(map(str, run.seeds))),
        ("created", str(info.get("created") or "")),
    ]
    return [(name, text) for name, text in rows if text]


def identities(run: RunResults) -> list[tuple[str, str]]:
    """Return the fingerprints and digests that a run can be recognised by."""
    info = run.info
    rows = [
        ("configuration", info.get("digest")),
        ("base model", (info.get("model") or {}).get("fingerprint")),
        *((f"dataset {d.get('name')}", d.get("digest")) for d in info.get("datasets") or ()),
    ]
    return [(name, str(text)) for name, text in rows if text]


def repeat(run: RunResults) -> str:
    """Return the command that repeats a run, given its configuration as `run.yaml`."""
    command = run.info.get("command")
    return str(command) if command else "errata bench run.yaml --out FOLDER"


def as_yaml(run: RunResults) -> str:
    """Return a run's configuration as a run file."""
    import yaml

    config = run.info.get("config") or {}
    return yaml.safe_dump(
        json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True, width=96
    )


def surroundings(run: RunResults) -> list[tuple[str, str]]:
    """Return what a run ran on: versions and machine."""
    return [*flat(run.info.get("versions") or {}), *flat(run.info.get("machine") or {})]


def flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested data as (dotted name, value)."""
    rows: list[tuple[str, str]] = []
    for key, item in data.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            rows += flat(item, f"{name}.")
        else:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            rows.append((name, text))
    return rows


def _model(model: Mapping[str, Any]) -> str:
    more = []
    if model.get("model_type"):
        more.append(str(model["model_type"]))
    if model.get("parameters"):
        more.append(f"{int(model['parameters']):,} parameters")
    return str(model.get("name") or "") + (f" ({', '.join(more)})" if more else "")


def _dataset(one: Mapping[str, Any]) -> str:
    text = f"{one.get('name')}: {count(int(one.get('cases') or 0), 'case')}"
    return text + (f", {one['skipped']} skipped" if one.get("skipped") else "")
