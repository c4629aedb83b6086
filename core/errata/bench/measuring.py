"""Measuring many cases at once on a model in one state, told apart again; the base's answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.run_spec import Case, case_name
from errata.common.storage import write_bytes
from errata.errors import IntegrityError, StorageError, reason_of
from errata.evaluate import Baseline, Measurement, Reader
from errata.evaluate.baseline import answers_json, answers_of
from errata.evaluate.known_protocols import installed_protocols, measured
from errata.evaluate.pooling import harmonic_mean, one_value
from errata.evaluate.protocols import lifelong
from errata.evaluate.reader import KnownAnswers

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.request import Request
    from errata.evaluate import MeasureSettings

SCHEMA = 2


def measure(
    editor: Editor,
    cases: Sequence[Case],
    protocols: Sequence[str],
    baseline: Baseline,
    *,
    alone: bool = False,
) -> list[list[Measurement]]:
    """Measure the model as it stands on several cases together; return each case's own numbers.

    Case-independent numbers (perplexity, retained probes) are returned only if the case's edit is
    the only one on the model (`alone`). Else they belong to the state (`measure_state`) and are
    dropped, even if just one case is measured.
    """
    if not protocols:
        return [[] for _ in cases]
    found = editor.evaluate(requests_of(cases), protocols, baseline=baseline)
    return [found] if alone and len(cases) == 1 else of_each_case(found, cases)


def measure_state(
    editor: Editor,
    cases: Sequence[Case],
    protocols: Sequence[str],
    beside: Mapping[str, Collection[str]],
    baseline: Baseline,
    *,
    accurate: Sequence[Case] = (),
    unedited: bool = False,
) -> list[Measurement]:
    """Measure the model as a whole after some cases.

    Args:
        editor: whose model is measured.
        cases: edited so far.
        protocols: whose numbers are all about the model as a whole.
        beside: per-case protocols of which only the case-independent numbers are returned → the
            kinds of requests that each is asked about, () for all.
        baseline: what the base answers.
        accurate: cases that were right when they came, and were not edited; `lifelong`'s ARR is
            what its ERR would be of them.
        unedited: measure the base; what it answers is added to the baseline's memory.
    """

    def asked(requests: Sequence[Request], names: Sequence[str]) -> Sequence[Measurement]:
        if unedited:
            return measure_unedited(editor, requests, names, baseline.settings, baseline.memory)
        return editor.evaluate(requests, names, baseline=baseline)

    requests, spared = requests_of(cases), requests_of(accurate)
    found = list(asked(requests, protocols)) if requests else _of_accurate(asked(spared, protocols))
    if requests and spared and lifelong.NAME in protocols:
        apart = replace(baseline, settings=replace(baseline.settings, retain=()))
        found += _of_accurate(editor.evaluate(spared, [lifelong.NAME], baseline=apart))
    names = {case_name(case) for case in cases}
    for protocol, kinds in beside.items():
        some = [request for request in requests if not kinds or request.kind in kinds]
        if some:
            found += [
                item
                for item in asked(some, [protocol])
                if not item.of and not names & set(item.case_ids)
            ]
    return found


def _of_accurate(found: Sequence[Measurement]) -> list[Measurement]:
    """Return measurements of requests that were not edited: their ERR is the ARR."""
    return [
        replace(one, metric=f"ARR{one.metric.removeprefix('ERR')}")
        if one.metric.startswith("ERR")
        else one
        for one in found
    ]


def measure_base(
    editor: Editor,
    cases: Sequence[Case],
    protocols: Sequence[str],
    settings: MeasureSettings,
    memory: KnownAnswers | None = None,
) -> tuple[list[list[Measurement]], KnownAnswers]:
    """Measure the unedited model; return each case's numbers and what they were taken from.

    `memory`: what it is known to answer already, which is not asked again; the rest is added.
    """
    memory = KnownAnswers() if memory is None else memory
    found = measure_unedited(editor, requests_of(cases), protocols, settings, memory)
    return of_each_case(found, cases, of_base=True), memory


def measure_unedited(
    editor: Editor,
    requests: Sequence[Request],
    protocols: Sequence[str],
    settings: MeasureSettings,
    memory: KnownAnswers,
) -> list[Measurement]:
    """Measure the model with every edit off by any protocols.

    What it answers is added to `memory`; what is known there is not asked again.
    """
    model = editor.model
    known = installed_protocols()
    reader = Reader(model, requests, settings, memory, of_base=True)
    base = Baseline(model.fingerprint, settings, memory)
    found: list[Measurement] = []
    with reader.state():
        for name in protocols:
            if name in known and known[name].measure:
                found += measured(known[name], reader)
            else:
                found += editor.evaluate(requests, [name], baseline=base)
    probes = [p for r in requests for p in (*r.neighbourhood, *r.locality) if not p.answers]
    if probes and protocols and reader.generates:
        # The `*_unchanged` metrics of edited models need the base's text here.
        reader.texts(probe.prompt for probe in probes)
    return found


def of_each_case(
    found: Sequence[Measurement], cases: Sequence[Case], *, of_base: bool = False
) -> list[list[Measurement]]:
    """Return the measurements of each case by itself, as if it had been measured alone.

    Case-independent numbers (of texts, of retained probes) are dropped; with `of_base` each case
    gets a copy, so that what its edit changed there can be compared case by case.
    """
    names = [case_name(case) for case in cases]
    own: dict[str, list[Measurement]] = {name: [] for name in names}
    for item in found:
        if item.of:
            for mine in own.values():
                there = {(one.name, one.metric): one for one in mine}
                parts = [there.get((item.name, metric)) for metric in item.of]
                known = [part for part in parts if part is not None]
                if len(known) == len(parts):
                    mine += harmonic_mean(item.metric, known, item.protocol)
            continue
        values: dict[str, list[float]] = {}
        for name, value in zip(item.case_ids, item.cases, strict=False):
            values.setdefault(name, []).append(value)
        if of_base and values and not values.keys() & own.keys():
            for name, mine in own.items():
                mine.append(replace(one_value(item, name), answers=()))
        for name, some in values.items():
            if name not in own:  # about a text or a retained probe, not about a case
                continue
            own[name].append(
                Measurement.mean(
                    item.metric,
                    some,
                    item.protocol,
                    case_ids=[name] * len(some),
                    unit=item.unit,
                    direction=item.direction,
                    answers=[answer for answer in item.answers if answer.case_id == name],
                )
            )
    return [own[name] for name in names]


def requests_of(cases: Iterable[Case]) -> list[Request]:
    """Return the requests of cases in their order."""
    return [request for case in cases for request in case]


def told_apart_by_name(cases: Sequence[Case]) -> bool:
    """Say whether cases can be told apart by their names."""
    return len({case_name(case) for case in cases}) == len(cases)


# -- what the base answered, on disk ---------------------------------------------------------------


def save_answers(path: Path, memory: KnownAnswers, fingerprint: str) -> None:
    """Write what the base answered; floats come back bit for bit."""
    data = {"schema": SCHEMA, "fingerprint": fingerprint, "answers": answers_json(memory)}
    write_bytes(path, json.dumps(data).encode())


def load_answers(path: Path, fingerprint: str) -> KnownAnswers:
    """Read what the base answered; an empty memory where nothing was kept.

    Raises `IntegrityError` for a file that is damaged or of another model.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA or data["fingerprint"] != fingerprint:
            raise ValueError("it is of another model or another version of errata")
        return answers_of(data["answers"])
    except FileNotFoundError:
        return KnownAnswers()
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {reason_of(error)}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}. Delete it: what it held is asked again when needed."
        ) from None


def joined_answers(memories: Iterable[KnownAnswers]) -> KnownAnswers:
    """Return one memory of several; what is added to it stays out of them.

    Each measurement gets its own copy, so that what one case adds changes no other's batches.
    """
    whole = KnownAnswers()
    for memory in reversed(list(memories)):  # of several answers the first one given is kept
        whole.add(memory)
    return whole
