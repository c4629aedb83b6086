"""Which results belong together: sections (model, dataset, regime) and their columns (variants)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from errata.bench.config import BASE
from errata.bench.report.data_identity import data_keys
from errata.bench.report.reading import ResultEntry, RunResults
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.evaluate import Measurement

IMMEDIATE, FINAL, ONCE = "immediate", "final", ""
MOMENTS = {"single": ONCE, "batch": ONCE, "immediate": IMMEDIATE, "checkpoint": FINAL}
_SEED = re.compile(r"\bseed \d+\b")


@dataclass(frozen=True)
class Column:
    """One variant of one configuration, its seeds pooled.

    Attributes:
        label: what it is called here, unique in the report's section.
        method: of its edits; "base" for the unedited model.
        variant: its label in its own run.
        runs: names of the runs that it comes from.
        seeds: that are pooled.
        settings: its resolved hyper-parameters.
        entries: its results.
    """

    label: str
    method: str
    variant: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[ResultEntry, ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether this is the unedited model."""
        return self.method == BASE

    @cached_property
    def case_ids(self) -> frozenset[str | None]:
        """The cases that were measured."""
        return frozenset(entry.case_id for entry in self.entries if entry.kind == "case")

    @property
    def cases(self) -> int:
        """How many different cases were measured."""
        return len(self.case_ids)

    def at(self, moment: str) -> list[ResultEntry]:
        """Return the case entries of a moment: each case once per seed."""
        if self.is_base:
            return [entry for entry in self.entries if entry.kind == "case"]
        found = [e for e in self.entries if e.kind == "case" and MOMENTS.get(e.stage) == moment]
        if moment != FINAL:
            return found
        last = {seed: self._last_step(seed) for seed in self.seeds}
        return [entry for entry in found if entry.step == last[entry.seed]]

    def steps(self, kind: str = "case") -> list[int]:
        """Return the steps at which the model was looked at again, ascending."""
        return sorted(
            {e.step for e in self.entries if e.kind == kind and MOMENTS.get(e.stage) == FINAL}
        )

    def states(self, moment: str) -> list[ResultEntry]:
        """Return the states of the model at a moment: in a stream the last one of each seed."""
        found = [
            entry
            for entry in self.entries
            if entry.kind == "state" and (self.is_base or MOMENTS.get(entry.stage) == moment)
        ]
        if moment != FINAL:
            return found
        last = {seed: max(e.step for e in found if e.seed == seed) for seed in self._seeds(found)}
        return [entry for entry in found if entry.step == last[entry.seed]]

    @staticmethod
    def _seeds(entries: Iterable[ResultEntry]) -> set[int]:
        return {entry.seed for entry in entries}

    def _last_step(self, seed: int) -> int:
        """Return the last step at which every earlier case was measured; else the last one."""
        own = [entry for entry in self.entries if entry.seed == seed and entry.case_id is not None]
        there = Counter(e.step for e in own if MOMENTS.get(e.stage) == FINAL)
        edited = [e.step for e in own if MOMENTS.get(e.stage) == IMMEDIATE and e.kind == "case"]
        complete = [s for s, n in there.items() if n >= sum(1 for step in edited if step <= s)]
        return max(complete or there, default=0)


@dataclass(frozen=True)
class Section:
    """Everything about one model, one dataset and one regime; its first column is the base.

    Attributes:
        model: name of the model.
        dataset: name of the dataset; with what tells it apart, where runs call other data so too.
        regime: "single", "batch", "sequential" …
        columns: the base, then the variants.
    """

    model: str
    dataset: str
    regime: str
    columns: tuple[Column, ...]

    @property
    def title(self) -> str:
        """What the section is about, in a few words."""
        return " · ".join(part for part in (self.dataset, self.regime) if part)

    @cached_property
    def edited(self) -> tuple[Column, ...]:
        """The columns other than the base."""
        return tuple(column for column in self.columns if not column.is_base)

    @cached_property
    def moments(self) -> tuple[str, ...]:
        """When edited models were measured: once, or right after each edit and at the end."""
        found = {
            MOMENTS.get(entry.stage)
            for column in self.edited
            for entry in column.entries
            if entry.kind != "failure"
        }
        return tuple(moment for moment in (ONCE, IMMEDIATE, FINAL) if moment in found)


def sections(runs: Sequence[RunResults]) -> list[Section]:
    """Return the sections of several runs; runs that differ in their seeds only are pooled."""
    groups = _groups(runs)
    named = data_keys([run for group in groups for run in group])
    models: dict[str, str] = {}
    columns: dict[
        tuple[str, str, str], dict[tuple[int, str], list[tuple[RunResults, ResultEntry]]]
    ] = {}
    bases: dict[tuple[str, str], list[tuple[RunResults, ResultEntry]]] = {}
    numbered = ((index, run) for index, group in enumerate(groups) for run in group)
    for number, (index, run) in enumerate(numbered):
        model = _model(run)
        models.setdefault(model, str(run.info.get("model", {}).get("name", "")))
        for entry in run.entries:
            dataset = named[number, entry.dataset]
            if entry.is_base:
                bases.setdefault((model, dataset), []).append((run, entry))
                continue
            place = columns.setdefault((model, dataset, entry.regime), {})
            place.setdefault((index, entry.variant), []).append((run, entry))
    for (model, dataset), found in bases.items():  # a run that holds nothing but its base so far
        if not any(key[:2] == (model, dataset) for key in columns):
            columns[model, dataset, found[0][1].regime] = {}
    made = [
        Section(
            models[model],
            dataset,
            regime,
            (
                _base(bases.get((model, dataset), []), place),
                *(
                    _column(_label(groups, key, place), found)
                    for key, found in sorted(
                        place.items(), key=lambda item: _order(groups, item[0])
                    )
                ),
            ),
        )
        for (model, dataset, regime), place in columns.items()
    ]
    return [_one_protocol(section) for section in made]


def sample(entries: Iterable[ResultEntry]) -> list[list[Measurement]]:
    """Return the measurements of each case; those of several seeds averaged first.

    A case is then one observation however many seeds ran it, and intervals are over cases. The
    same case of the base is one observation however many runs asked it. What its evaluation asked
    of the model as a whole (retained probes, texts) is one value of it, too.
    """
    from errata.evaluate.pooling import of_case

    seen: Counter[tuple[int, str | None]] = Counter()
    cases: dict[tuple[str | None, int], list[ResultEntry]] = {}
    for entry in entries:
        seen[entry.seed, entry.case_id] += not entry.is_base
        cases.setdefault((entry.case_id, seen[entry.seed, entry.case_id]), []).append(entry)
    return [
        of_case(average([entry.measurements for entry in same]), case)
        if case is not None
        else average([entry.measurements for entry in same])
        for (case, _), same in cases.items()
    ]


def average(many: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """Return the same measurements taken with several seeds as one, averaged case by case."""
    averaged = []
    for same in _by_metric(many):
        first = same[0]
        if len(same) > 1 and not first.of:
            if _same_cases(same):
                first = _averaged(same)
            else:
                value = math.fsum(one.value for one in same) / len(same)
                first = replace(first, value=value, interval=None, cases=(), case_ids=())
        averaged.append(first)
    return averaged


def of_states(entries: Sequence[ResultEntry]) -> list[Measurement]:
    """Return the measurements of the model as a whole, those of several states joined.

    What was measured on the same cases with several seeds is averaged case by case; on different
    cases (batches) it is pooled; a number without cases (perplexity), or on the same retained
    probes after several batches, is one value per state. The base is one state however many runs
    asked it.
    """
    from errata.evaluate import pool

    if len(entries) == 1:
        return list(entries[0].measurements)
    found = []
    of_base = all(entry.is_base for entry in entries)
    seeds = {id(one): entry.seed for entry in entries for one in entry.measurements}
    for same in _by_metric([entry.measurements for entry in entries]):
        groups: dict[tuple[str, ...], list[Measurement]] = {}
        for one in same:
            groups.setdefault(one.case_ids, []).append(one)
        joined: list[Measurement] = []
        for group in groups.values():
            one_state = of_base or len({seeds[id(one)] for one in group}) == len(group)
            if len(group) > 1 and one_state and _same_cases(group):
                joined.append(_averaged(group))
            else:
                joined += group[:1] if of_base else group
        found += pool([one] for one in joined)
    return found


def _by_metric(many: Sequence[Sequence[Measurement]]) -> list[list[Measurement]]:
    found: dict[tuple[str, str], list[Measurement]] = {}
    for group in many:
        for one in group:
            found.setdefault((one.metric, one.protocol), []).append(one)
    return list(found.values())


def _same_cases(same: Sequence[Measurement]) -> bool:
    return all(one.is_mean and one.case_ids == same[0].case_ids for one in same) and (
        len({len(one.cases) for one in same}) == 1
    )


def _averaged(same: Sequence[Measurement]) -> Measurement:
    from errata.evaluate import Measurement

    first = same[0]
    values = [math.fsum(row) / len(row) for row in zip(*(one.cases for one in same), strict=True)]
    return Measurement.mean(
        first.metric,
        values,
        first.protocol,
        case_ids=first.case_ids,
        unit=first.unit,
        direction=first.direction,
    )


def table_of(cases: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """Return one measurement per metric from those of many cases."""
    from errata.evaluate import pool

    return pool(cases)


# -- grouping --------------------------------------------------------------------------------------


def _groups(runs: Sequence[RunResults]) -> list[list[RunResults]]:
    """Return the runs in groups that differ in nothing but their seeds."""
    found: dict[str, list[RunResults]] = {}
    for run in runs:
        config = {k: v for k, v in run.info.get("config", {}).items() if k != "name"}
        identity = run.info.get("identity") or [config, run.info.get("datasets"), _model(run)]
        key = json.dumps(_without_seeds(identity), sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    return list(found.values())


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_seeds(v) for k, v in value.items() if k not in ("seed", "seeds")}
    return [_without_seeds(item) for item in value] if isinstance(value, list) else value


def _model(run: RunResults) -> str:
    model = run.info.get("model", {})
    return str(model.get("fingerprint") or model.get("name") or "")


def _variants(group: Sequence[RunResults]) -> list[str]:
    named = [str(v.get("label")) for run in group for v in run.info.get("variants", ())]
    seen = [entry.variant for run in group for entry in run.entries if not entry.is_base]
    return list(dict.fromkeys([*named, *seen]))


def _order(groups: Sequence[Sequence[RunResults]], key: tuple[int, str]) -> tuple[int, int]:
    index, variant = key
    return index, _variants(groups[index]).index(variant)


def _label(
    groups: Sequence[Sequence[RunResults]], key: tuple[int, str], beside: Iterable[tuple[int, str]]
) -> str:
    """Name a column: its variant; followed by its run where another one beside it has that too."""
    index, variant = key
    rivals = [other for other, name in beside if name == variant and other != index]
    if not rivals:
        return variant
    run = groups[index][0]
    if any(groups[other][0].name == run.name for other in rivals):
        return f"{variant} ({run.name} {str(run.info.get('digest', index + 1))[:6]})"
    return f"{variant} ({run.name})"


def _column(label: str, found: Sequence[tuple[RunResults, ResultEntry]]) -> Column:
    _refuse_repeated(label, found)
    runs, first = list(dict.fromkeys(run.name for run, _ in found)), found[0][1]
    described = [
        variant
        for run, _ in found[:1]
        for variant in run.info.get("variants", ())
        if variant.get("label") == first.variant
    ]
    return Column(
        label=label,
        method=first.method,
        variant=first.variant,
        runs=tuple(runs),
        seeds=tuple(sorted({entry.seed for _, entry in found})),
        settings=described[0].get("config") or {} if described else {},
        entries=tuple(entry for _, entry in found),
    )


def _base(
    found: Sequence[tuple[RunResults, ResultEntry]],
    place: Mapping[Any, Sequence[tuple[RunResults, ResultEntry]]],
) -> Column:
    """Return the base's column: only the cases that some variant was tried on."""
    tried = {entry.case_id for many in place.values() for _, entry in many}
    kept = [
        (run, entry)
        for run, entry in found
        if not place or entry.case_id is None or entry.case_id in tried
    ]
    return Column(
        label=BASE,
        method=BASE,
        variant=BASE,
        runs=tuple(dict.fromkeys(run.name for run, _ in kept)),
        seeds=tuple(sorted({entry.seed for _, entry in kept})),
        entries=tuple(entry for _, entry in kept),
    )


def _one_protocol(section: Section) -> Section:
    """Return a section of several seeds with one protocol where a protocol names the seed.

    A text sampled with seed 3 in the run with seed 3 is measured like one sampled with seed 4 in
    the run with seed 4.
    """
    if len({seed for column in section.columns for seed in column.seeds}) < 2:
        return section
    return replace(
        section,
        columns=tuple(
            replace(
                column,
                entries=tuple(
                    replace(
                        entry,
                        measurements=tuple(
                            replace(one, protocol=_SEED.sub("the run's seed", one.protocol))
                            for one in entry.measurements
                        ),
                    )
                    for entry in column.entries
                ),
            )
            for column in section.columns
        ),
    )


def _refuse_repeated(label: str, found: Sequence[tuple[RunResults, ResultEntry]]) -> None:
    """Refuse two runs that hold one case of one variant and seed: it would count twice."""
    seen: dict[tuple[Any, ...], RunResults] = {}
    for run, entry in found:
        key = (entry.kind, entry.seed, entry.stage, entry.step, entry.case_id, entry.index)
        other = seen.setdefault(key, run)
        if other is not run:
            raise ConfigError(
                f"{str(other.path)!r} and {str(run.path)!r} hold the same cases of {label!r} with "
                f"seed {entry.seed} and the same configuration: leave one of them out, or run one "
                "with another seed."
            )
