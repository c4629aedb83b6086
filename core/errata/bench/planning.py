"""Before a run: whether it can be done, how much there is to do, and what it may cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.config import BASE, STREAMS, BenchConfig
from errata.bench.results import load, read_info
from errata.bench.run_spec import Case, RunSpec
from errata.bench.work_units import (
    WorkUnit,
    base_state_units,
    base_units,
    edit_units,
    keys_of,
    left_over,
    to_retry,
)
from errata.contract import plugins
from errata.contract.registry import Registry
from errata.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from errata.bench.worker import Worker
    from errata.contract.stanzas import Capabilities


@dataclass(frozen=True)
class CaseCost:
    """What one case of a column takes, in seconds.

    Attributes:
        edit: of making and recording the edit.
        measure: of measuring it.
        n: how many cases that was learnt from.
    """

    edit: float
    measure: float
    n: int


@dataclass(frozen=True)
class PlannedColumn:
    """What is to be done for one variant (or the base), all datasets and seeds together.

    Attributes:
        label: of the variant.
        method: its name.
        cases: cases in all.
        edits: requests that are edited.
        measured: how many times a case is measured.
        states: how many times the model as a whole is measured.
        done: lines that are written already.
        cannot: cases whose kind of request the method does not declare: they become failures.
        seconds: estimated time for what is left, None where nothing is known.
    """

    label: str
    method: str
    cases: int
    edits: int
    measured: int
    states: int
    done: int
    cannot: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class BenchPlan:
    """What a run amounts to.

    Attributes:
        config: the run.
        columns: the base, then the variants.
        protocols: dataset → how its cases are measured, and the model as a whole.
        estimate: where the times come from; "" where there are none.
    """

    config: BenchConfig
    columns: tuple[PlannedColumn, ...]
    protocols: Mapping[str, Mapping[str, tuple[str, ...]]]
    estimate: str = ""

    @property
    def seconds(self) -> float | None:
        """Estimated time of the whole run in one process; None where a column has none."""
        each = [column.seconds for column in self.columns]
        return None if None in each else sum(s for s in each if s is not None)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "name": self.config.name,
            "model": self.config.model,
            "regime": self.config.regime,
            "seeds": list(self.config.seeds),
            "columns": [asdict(column) for column in self.columns],
            "protocols": {k: {m: list(n) for m, n in v.items()} for k, v in self.protocols.items()},
            "seconds": self.seconds,
            "estimate": self.estimate,
        }


def plan(
    config: BenchConfig | Mapping[str, Any],
    directory: str | Path | None = None,
    *,
    probe: int = 0,
    trust_remote_code: bool = False,
    retry_failed: bool = False,
) -> BenchPlan:
    """Say what a run would do, without doing it.

    Args:
        config: the run, or a mapping of its fields.
        directory: of the run: what is done already is counted, and its times give the estimate.
        probe: carry out so many cases per variant, keeping nothing, to learn how long one takes.
        trust_remote_code: of `run`; only a probe opens the model.
        retry_failed: of `run`: what failed before is to be done again.

    Raises:
        ConfigError, UnknownNameError, CapabilityError: it cannot be run; or the directory holds
            another run, as far as that shows without the model.
    """
    folder = None if directory is None else Path(directory)
    spec = RunSpec(BenchConfig.parse(config), folder, trust_remote_code)
    entries = check_run(spec)
    kinds: dict[str, str] = {}
    costs: dict[str, CaseCost] = {}
    source = ""
    if folder is not None and (info := read_info(folder)) is not None:
        from errata.bench.run_identity import check_same, foreseen

        check_same(folder.resolve(), info, foreseen(spec, info))
        there = load(folder)
        kinds, costs = there.kinds, known_costs(there)
        source = f"the cases that {directory} holds" if costs else ""
        if retry_failed:
            again = to_retry(spec, kinds)
            kinds = {key: kind for key, kind in kinds.items() if key not in again}
    if probe:
        costs.update(timed_sample(spec, probe))
        source = f"{probe} timed case{'s' if probe > 1 else ''} per variant"
    labels = (BASE, *(variant.label for variant in spec.config.methods))
    units: dict[str, list[WorkUnit]] = {label: [] for label in labels}
    for unit in [*base_units(spec), *base_state_units(spec), *edit_units(spec)]:
        units[spec.label(unit.variant)].append(unit)
    columns = tuple(
        _column(spec, label, mine, entries.get(label), kinds, costs.get(label))
        for label, mine in units.items()
    )
    protocols = {
        spec.title(i): {"cases": spec.protocols(i), "state": spec.whole(i)}
        for i in range(len(spec.config.datasets))
    }
    return BenchPlan(spec.config, columns, protocols, source)


def _column(
    spec: RunSpec,
    label: str,
    units: list[WorkUnit],
    can: Capabilities | None,
    kinds: Mapping[str, str],
    cost: CaseCost | None,
) -> PlannedColumn:
    keys = [key for unit in units for key in keys_of(spec, unit)]
    states = sum("|state" in key for key in keys)
    edited = [
        spec.edited(spec.case(item, unit.seed), item.dataset, unit.variant)
        for unit in units
        for item in unit.items
    ]
    left = [key for unit in left_over(spec, units, kinds) for key in keys_of(spec, unit)
            if key not in unit.done]  # fmt: skip
    to_edit = [key for key in left if "|checkpoint|" not in key and "|state" not in key]
    to_measure = [key for key in left if "|state" not in key]
    is_base = label == BASE
    seconds = None
    if cost is not None:
        seconds = cost.measure * len(to_measure) + (0 if is_base else cost.edit * len(to_edit))
    return PlannedColumn(
        label=label,
        method=BASE if is_base else next(v.method for v in spec.config.methods if v.label == label),
        cases=len(edited),
        edits=0 if is_base else sum(map(len, edited)),
        measured=len(keys) - states,
        states=states,
        done=len(keys) - len(left),
        cannot=0 if can is None else sum(not _fits(can, case) for case in edited),
        seconds=seconds,
    )


# -- can it be done --------------------------------------------------------------------------------


def check_run(spec: RunSpec) -> dict[str, Capabilities]:
    """Raise for what cannot be run; return each variant's declared capabilities by its label.

    Needs no model: methods, hyper-parameters, datasets, protocols and the regime are looked at.
    """
    config = spec.config
    registry = Registry.load()
    entries: dict[str, Capabilities] = {}
    for number, variant in enumerate(config.methods):
        loaded = plugins.load(variant.method)
        given = spec.overrides(number, config.seeds[0])
        origins = dict.fromkeys(given, f"the run {config.name!r}, config of {variant.label}")
        registry.resolve(variant.method, loaded.config, {}, given, origins)
        can = entries[variant.label] = registry.method(variant.method).capabilities
        _check_regime(config, variant.label, variant.method, config.size(number), can)
    for index, (label, can) in enumerate(entries.items()):
        _check_kinds(spec, index, label, can)
    for number in range(len(config.datasets)):
        if not (*spec.protocols(number), *spec.whole(number)):
            raise ConfigError(
                f"Nothing would be measured on {spec.title(number)!r}: name protocols. Known: "
                f"{', '.join(sorted(spec.measuring.protocols()))}."
            )
        spec.settings(number, config.seeds[0])
    _ = spec.corpus, spec.training
    return entries


def _check_regime(
    config: BenchConfig, label: str, method: str, size: int, can: Capabilities
) -> None:
    if config.regime in STREAMS and not can.sequential:
        raise CapabilityError(
            f"{label}: {method} edits unedited models only, and in the regime {config.regime} "
            "edits follow one another. Leave it out, or choose single or batch."
        )
    if size > 1 and not can.batch:
        advice = "choose sequential" if config.regime == "batch" else "set its batch_size to 1"
        raise CapabilityError(
            f"{label}: {method} takes one request at a time, and the regime {config.regime} gives "
            f"it {size}. Leave it out, or {advice}."
        )
    if "training" in can.needs and config.train is None:
        raise ConfigError(
            f"{label}: {method} has to be trained, and the run names no `train`: give the dataset "
            "that it learns from."
        )
    if config.regime == "cross-domain" and "training" not in can.needs:
        raise CapabilityError(
            f"{label}: {method} does not train (it needs {', '.join(can.needs) or 'nothing'} "
            "beforehand), so there is no domain to cross. Leave it out, or choose single."
        )


def _check_kinds(spec: RunSpec, variant: int, label: str, can: Capabilities) -> None:
    """Raise where a variant can carry out no case of any dataset."""
    kinds: dict[str, set[str]] = {}
    for number in range(len(spec.config.datasets)):
        found = kinds.setdefault(spec.title(number), set())
        for seed in spec.config.seeds:
            for item in spec.stream(number, seed):
                case = spec.edited(spec.case(item, seed), number, variant)
                if _fits(can, case):
                    return
                found.update(request.kind for request in case)
    those = "; ".join(
        f"those of {title!r} are of kind {', '.join(sorted(some))}" for title, some in kinds.items()
    )
    raise CapabilityError(
        f"{label} carries out requests of kind {', '.join(can.kinds)}; {those}. Leave one of them "
        "out."
    )


def _fits(can: Capabilities, case: Case) -> bool:
    return all(request.kind in can.kinds for request in case)


# -- what it may cost ------------------------------------------------------------------------------


def known_costs(results: Any) -> dict[str, CaseCost]:
    """Return what the median case of each column took, from the lines of a run."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for line in results.cases():
        spent = line["seconds"]
        found.setdefault(line["variant"], []).append(
            (line["stage"], float(spent["edit"]), float(spent["measure"]))
        )
    return {
        label: CaseCost(
            edit=statistics.median([e for s, e, _ in many if s != "checkpoint"] or [0.0]),
            measure=statistics.fmean([m for _, _, m in many]),
            n=len(many),
        )
        for label, many in found.items()
    }


def timed_sample(spec: RunSpec, count: int) -> dict[str, CaseCost]:
    """Carry out a few cases of each variant on the base; return what they took."""
    from errata.bench.worker import Worker

    worker = Worker(spec)
    seed = spec.config.seeds[0]
    costs: dict[str, list[tuple[float, float]]] = {}
    try:
        for variant in range(-1, len(spec.config.methods)):
            if variant >= 0 and worker.prepare(variant, seed) is not None:
                continue  # it has no cases that could be timed
            for unit in _probes(spec, variant, seed, count):
                costs.setdefault(spec.label(variant), []).append(_timed(worker, unit))
    finally:
        worker.close()
    return {
        label: CaseCost(
            edit=statistics.fmean([edit for edit, _ in many]),
            measure=statistics.fmean([measure for _, measure in many]),
            n=len(many),
        )
        for label, many in costs.items()
    }


def _probes(spec: RunSpec, variant: int, seed: int, count: int) -> list[WorkUnit]:
    items = spec.stream(0, seed)[:count]
    return [WorkUnit("single", variant, 0, seed, (item,)) for item in items]


def _timed(worker: Worker, unit: WorkUnit) -> tuple[float, float]:
    """Return the seconds that editing and measuring one case takes."""
    from errata.bench import measuring
    from errata.evaluate import Baseline

    spec, editor = worker.spec, worker.editor
    case = spec.case(unit.items[0], unit.seed)
    protocols = spec.protocols(unit.dataset)
    settings = spec.settings(unit.dataset, unit.seed)
    if unit.variant < 0:
        started = time.perf_counter()
        measuring.measure_base(editor, [case], protocols, settings)
        return 0.0, time.perf_counter() - started
    base = measuring.measure_base(editor, [case], protocols, settings)[1]
    outcome = worker.edit(unit.variant, unit.seed, unit.items)
    started = time.perf_counter()
    baseline = Baseline(editor.model.fingerprint, settings, base)
    measuring.measure(editor, [case], protocols, baseline)
    spent = time.perf_counter() - started
    if outcome.ids:
        editor.revert(*outcome.ids)
    return outcome.wall, spent
