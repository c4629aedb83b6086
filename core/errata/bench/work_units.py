"""What is to be done, cut into pieces that can be handed to a worker, and the lines each writes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from errata.bench.config import STREAMS
from errata.bench.line_place import LinePlace
from errata.bench.run_spec import CHUNK, Item, RunSpec

Work = Literal["describe", "base", "base-state", "prepare", "single", "batch", "stream"]


@dataclass(frozen=True)
class WorkUnit:
    """One piece of work.

    Attributes:
        work: what sort.
        variant: number of the variant; -1 is the unedited model.
        dataset: number of the dataset; -1 where a stream mixes all.
        seed: of the run.
        items: cases it is about, in order.
        done: keys of its lines that are written already.
        failed: keys (among `done`) of cases that failed: they are not measured again later.
        careful: measure cases one by one: a worker died over this unit before.
        given_up: key → error: not to be tried again, only reported.
    """

    work: Work
    variant: int = -1
    dataset: int = -1
    seed: int = 0
    items: tuple[Item, ...] = ()
    done: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    careful: bool = False
    given_up: Mapping[str, str] = field(default_factory=dict)


def keys_of(spec: RunSpec, unit: WorkUnit) -> Iterator[str]:
    """Yield the keys of all lines that a unit writes if no case fails, in their order."""
    if unit.work in ("describe", "prepare"):
        return
    if unit.work == "base-state":
        yield place_of_state(unit, unit.dataset, "base", 0).key(spec)
        return
    if unit.work == "stream":
        yield from _stream_keys(spec, unit)
        return
    for item in unit.items:
        yield place_of_case(unit, item).key(spec)
    if unit.work == "batch" and spec.whole(unit.dataset):
        yield place_of_batch(unit).key(spec)


def place_of_case(unit: WorkUnit, item: Item) -> LinePlace:
    """Return where the line of a case belongs, outside of streams."""
    step = {"base": 0, "single": 1}.get(unit.work, len(unit.items))
    return LinePlace(unit.variant, item.dataset, unit.seed, unit.work, step, item.number)


def place_of_batch(unit: WorkUnit) -> LinePlace:
    """Return where the line of a batch's state belongs."""
    return replace(place_of_case(unit, unit.items[0]), of_state=True)


def place_of_state(unit: WorkUnit, dataset: int, stage: str, step: int) -> LinePlace:
    """Return where the line of the base's state belongs, or of a stream's after `step` cases."""
    return LinePlace(unit.variant, dataset, unit.seed, stage, step, None, of_state=True)


def place_of_edit(spec: RunSpec, unit: WorkUnit, position: int) -> LinePlace:
    """Return where the line belongs that is written right after the edit at a stream's position.

    Its step is the number of cases edited then: those of one call all have that of the last.
    """
    dataset = unit.items[position].dataset
    calls = spec.calls(unit.variant, len(unit.items))
    step = calls[bisect(calls, position, key=lambda call: call.start) - 1].stop
    return LinePlace(unit.variant, dataset, unit.seed, "immediate", step, position)


def place_at_checkpoint(unit: WorkUnit, position: int, step: int) -> LinePlace:
    """Return where the line of a stream's case belongs, measured again after `step` cases."""
    dataset = unit.items[position].dataset
    return LinePlace(unit.variant, dataset, unit.seed, "checkpoint", step, position)


def _stream_keys(spec: RunSpec, unit: WorkUnit) -> Iterator[str]:
    checkpoints = set(spec.checkpoints(len(unit.items)))
    kept: dict[Item, int] = {}
    for position, item in enumerate(unit.items):
        key = place_of_edit(spec, unit, position).key(spec)
        yield key
        if key not in unit.failed:
            kept[item] = position
        step = position + 1
        if step not in checkpoints:
            continue
        for chunk in spec.chunks(list(kept)):
            for one in chunk:
                yield place_at_checkpoint(unit, kept[one], step).key(spec)
        for dataset in sorted({one.dataset for one in kept}):
            if spec.whole(dataset):
                yield place_of_state(unit, dataset, "checkpoint", step).key(spec)


def base_units(spec: RunSpec) -> list[WorkUnit]:
    """Return the measurement of the unedited model: before anything else."""
    found = []
    for seed in spec.config.seeds:
        for dataset in range(len(spec.config.datasets)):
            items = [Item(dataset, i) for i in range(len(spec.cases(dataset, seed)))]
            found += [
                WorkUnit("base", -1, dataset, seed, tuple(items[start : start + CHUNK]))
                for start in range(0, len(items), CHUNK)
            ]
    return found


def base_state_units(spec: RunSpec) -> list[WorkUnit]:
    """Return the measurement of the unedited model as a whole: it uses the cases' answers."""
    return [
        WorkUnit("base-state", -1, dataset, seed)
        for seed in spec.config.seeds
        for dataset in range(len(spec.config.datasets))
        if spec.whole(dataset)
    ]


def edit_units(spec: RunSpec) -> list[WorkUnit]:
    """Return everything that edits, in the order of seeds, variants and datasets."""
    found: list[WorkUnit] = []
    config = spec.config
    for seed in config.seeds:
        for variant in range(len(config.methods)):
            if config.regime == "continual":
                found.append(WorkUnit("stream", variant, -1, seed, tuple(spec.stream(-1, seed))))
                continue
            for dataset in range(len(config.datasets)):
                items = tuple(spec.stream(dataset, seed))
                if config.regime in STREAMS:
                    found.append(WorkUnit("stream", variant, dataset, seed, items))
                    continue
                size = config.size(variant)
                work: Work = "batch" if config.regime == "batch" else "single"
                found += [
                    WorkUnit(work, variant, dataset, seed, items[start : start + size])
                    for start in range(0, len(items), size)
                ]
    return found


def prepare_units(spec: RunSpec, units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """Return the preparation of each variant and seed that something is left to do for."""
    wanted = dict.fromkeys((unit.variant, unit.seed) for unit in units)
    return [WorkUnit("prepare", variant, -1, seed) for variant, seed in wanted]


def left_over(
    spec: RunSpec, units: Sequence[WorkUnit], done: Mapping[str, str] | Collection[str]
) -> list[WorkUnit]:
    """Return the units that have a line to write, told what is written already.

    Args:
        spec: the run.
        units: what there was to do.
        done: key → kind of every line that is there.
    """
    kinds = done if isinstance(done, Mapping) else dict.fromkeys(done, "case")
    found = []
    for unit in units:
        first = list(keys_of(spec, unit))
        written = frozenset(key for key in first if key in kinds)
        failed = frozenset(key for key in written if kinds[key] == "failure")
        now = replace(unit, done=unit.done | written, failed=unit.failed | failed)
        if any(key not in now.done for key in keys_of(spec, now)):
            found.append(now)
    return found


def to_retry(spec: RunSpec, kinds: Mapping[str, str]) -> set[str]:
    """Return the keys of lines to be written again so that what failed is tried again.

    They are the keys of failures, and all keys of a batch that has one: its cases are edited
    together.

    Args:
        spec: the run.
        kinds: key → kind of every line that is there.
    """
    found: set[str] = set()
    for unit in [*base_units(spec), *base_state_units(spec), *edit_units(spec)]:
        written = [key for key in keys_of(spec, unit) if key in kinds]
        failed = [key for key in written if kinds[key] == "failure"]
        found.update(written if failed and unit.work == "batch" else failed)
    return found
