"""A run as every process sees it: configuration, cases, protocols and where things are kept."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from errata.bench.config import BASE, SINGLE, STREAMS, BenchConfig, DatasetSpec
from errata.edits.request import OPERATIONS
from errata.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from errata.contract.manager import Manager
    from errata.contract.stanzas import Capabilities
    from errata.datasets import Dataset
    from errata.edits.request import Probe, Request
    from errata.evaluate import MeasureSettings

Case = tuple["Request", ...]
CHUNK = 32
"""Cases measured together on a model in one state; fixed, so that numbers do not depend on it."""

WHOLE = ("general", "lifelong")
"""Protocols about the model as a whole: measured once per state, not once per case."""

BESIDE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*WHOLE, "ke"), ()),
    "knowedit": ("erase", "sentiment"),
}
"""Per-case protocols that also measure something case-independent (retained probes) → the kinds
of requests for which they do, () for all."""


class Item(NamedTuple):
    """A case's place: number of its dataset, number within it."""

    dataset: int
    number: int


class RunSpec:
    """What a run consists of. It holds no model and is cheap to make.

    Args:
        config: the run.
        directory: its folder; None where nothing is kept (planning).
        trusted: run code that comes with the model. No run file can say so.
    """

    def __init__(
        self, config: BenchConfig, directory: Path | None = None, trusted: bool = False
    ) -> None:
        self.config = config
        self.trusted = trusted
        self.directory = directory
        self._cases: dict[tuple[int, int], list[Case]] = {}
        self._texts: dict[int, tuple[str, ...]] = {}
        self._calls: dict[tuple[int, int], tuple[range, ...]] = {}

    # -- cases -----------------------------------------------------------------------------------

    @cached_property
    def datasets(self) -> list[Dataset]:
        """The datasets, opened."""
        return [
            open_dataset(spec, spec.limit or self.config.limit) for spec in self.config.datasets
        ]

    def title(self, dataset: int) -> str:
        """Return what a dataset is called in the results."""
        return self.config.datasets[dataset].title

    def cases(self, dataset: int, seed: int) -> list[Case]:
        """Return the cases of a dataset in the order that this seed puts them in."""
        key = (dataset, seed if self.config.shuffle else 0)
        if key not in self._cases:
            spec = self.config.datasets[dataset]
            found = selected_cases(self.datasets[dataset], spec, spec.limit or self.config.limit)
            if not found:
                raise ConfigError(f"The dataset {spec.title!r} gives no case to run.")
            if self.config.shuffle:
                random.Random(f"{seed}:{spec.title}").shuffle(found)
            self._cases[key] = found
        return self._cases[key]

    def case(self, item: Item, seed: int) -> Case:
        """Return one case."""
        return self.cases(item.dataset, seed)[item.number]

    def edited(self, case: Case, dataset: int, variant: int) -> Case:
        """Return the requests that a case is edited with; it is measured with its own.

        On the relation's side adding and deleting are one request where the method can do both at
        once, else one each.
        """
        if self.config.datasets[dataset].view == "entity":
            return case
        from errata.datasets.rake import relation_requests

        can = self.capabilities.get(variant)
        operations = OPERATIONS if can is None else can.operations
        return tuple(made for request in case for made in relation_requests(request, operations))

    @cached_property
    def capabilities(self) -> dict[int, Capabilities]:
        """What each variant's method declares."""
        from errata.contract.registry import Registry

        methods = Registry.load().methods
        return {
            number: methods[variant.method].capabilities
            for number, variant in enumerate(self.config.methods)
            if variant.method in methods
        }

    def chunks(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Group places so that each group is measured together: always the same groups."""
        groups: dict[tuple[int, int], list[Item]] = {}
        for item in sorted(items):
            groups.setdefault((item.dataset, item.number // CHUNK), []).append(item)
        yield from groups.values()

    def stream(self, dataset: int, seed: int) -> list[Item]:
        """Return the order of a stream's cases; `dataset` is -1 where all are mixed."""
        if dataset >= 0:
            return [Item(dataset, i) for i in range(len(self.cases(dataset, seed)))]
        each = [self.stream(number, seed) for number in range(len(self.config.datasets))]
        mixed = [item for items in each for item in items]
        if self.config.mix == "shuffle":
            random.Random(f"{seed}:mix").shuffle(mixed)
        if self.config.mix == "interleave":
            # Spread evenly, whatever their lengths: by the share of its own dataset that is over.
            lengths = [len(items) for items in each]
            mixed.sort(key=lambda item: ((item.number + 0.5) / lengths[item.dataset], item.dataset))
        return mixed

    def checkpoints(self, length: int) -> list[int]:
        """Return after how many cases of a stream all earlier ones are measured."""
        return sorted({step for step in self.config.checkpoints if step < length} | {length})

    def calls(self, variant: int, length: int) -> tuple[range, ...]:
        """Return which positions of a stream are edited in one call: none crosses a checkpoint."""
        key = (variant, length)
        if key not in self._calls:
            size, found, start = self.config.size(variant), [], 0
            for stop in self.checkpoints(length):
                found += [range(i, min(i + size, stop)) for i in range(start, stop, size)]
                start = stop
            self._calls[key] = tuple(found)
        return self._calls[key]

    @cached_property
    def corpus(self) -> list[str] | None:
        """Texts that second moments are measured on; None: those that ship with errata."""
        return None if self.config.corpus is None else read_corpus(Path(self.config.corpus))

    @cached_property
    def training(self) -> list[Request] | None:
        """Requests that methods which train learn from.

        None where the run names none, or where none of its methods learns.
        """
        spec = self.config.train
        learns = any("training" in can.needs for can in self.capabilities.values())
        if spec is None or not learns:
            return None
        cases = selected_cases(open_dataset(spec, spec.limit), spec, spec.limit)
        if not cases:
            raise ConfigError(f"The training data {spec.title!r} holds no case.")
        return [request for case in cases for request in case]

    @cached_property
    def retained(self) -> tuple[Probe, ...]:
        """Questions that no edit may change: those of the run's `retain` (`retained_probes`).

        A label, or the name where there are several, is the type of a dataset's probes: results
        tell them apart by it.
        """
        specs = self.config.retain
        found: list[Probe] = []
        for spec in specs:
            title = spec.title if len(specs) > 1 else spec.label
            found += _retained_as(spec, _titled(title, retained_probes(spec)))
        return tuple(found)

    # -- measuring -------------------------------------------------------------------------------

    @cached_property
    def measuring(self) -> Manager:
        """What measures: the core, other packages, and the run's methods where they do."""
        from errata.contract import plugins
        from errata.contract.manager import Manager

        names = dict.fromkeys(variant.method for variant in self.config.methods)
        loaded = [plugins.load(name) for name in names]
        own = [plugin for plugin in loaded if hasattr(plugin, "protocols")]
        return Manager("", [*plugins.in_group(), *own])

    def protocols(self, dataset: int) -> tuple[str, ...]:
        """Return how each case of a dataset is measured."""
        wanted = self._wanted(dataset)
        if self.config.regime in SINGLE:
            return wanted
        return tuple(name for name in wanted if name not in self.whole(dataset))

    def whole(self, dataset: int) -> tuple[str, ...]:
        """Return how the model as a whole is measured."""
        if self.config.state is not None:
            return self._checked(self.config.state)
        given = [name for name in WHOLE if name in self._wanted(dataset)]
        known = self.measuring.protocols()
        if self.config.regime == "batch":
            given = [*WHOLE[:1], *given]
        elif self.config.regime in STREAMS:
            given = [*WHOLE, *given]
        return tuple(name for name in dict.fromkeys(given) if name in known)

    def beside(self, dataset: int) -> dict[str, tuple[str, ...]]:
        """Return the per-case protocols whose case-independent numbers go on the state's line.

        After a single edit they go on the case's own line: the state is that of its edit.
        """
        if self.config.regime in SINGLE:
            return {}
        return {name: kinds for name, kinds in BESIDE.items() if name in self.protocols(dataset)}

    def unmeasured(self, dataset: int) -> list[str]:
        """Return the per-case protocols whose case-independent numbers are not recorded."""
        if self.whole(dataset):
            return []
        retained = bool(self.datasets[dataset].retain or self.retained)
        return [name for name in self.beside(dataset) if retained or name != "knowedit"]

    def alone(self, variant: int, stage: str) -> bool:
        """Say whether a case is measured right after an edit of this case and no other."""
        return self.config.regime in SINGLE or (
            stage == "immediate" and self.config.size(variant) == 1
        )

    def _wanted(self, dataset: int) -> tuple[str, ...]:
        if self.config.protocols is not None:
            return self._checked(self.config.protocols)
        return self._checked(self.datasets[dataset].protocols)

    def _checked(self, names: Sequence[str]) -> tuple[str, ...]:
        self.measuring.check_protocols(names)
        return tuple(dict.fromkeys(names))

    def settings(self, dataset: int, seed: int) -> MeasureSettings:
        """Return how questions are asked."""
        from errata.evaluate import MeasureSettings

        given = dict(self.config.settings)
        free = [f.name for f in dataclasses.fields(MeasureSettings)]
        free = [name for name in free if name not in ("seed", "retain")]
        for name in given:
            if name not in free:
                raise UnknownNameError("measuring setting", name, free, "The run sets the others.")
        for name in ("texts", "references", "harness_tasks", "leave_out"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        # What RS is fitted on must not depend on which cases are measured together.
        given["references"] = given.get("references") or self.references(dataset)
        own = _retained_as(self.config.datasets[dataset], self.datasets[dataset].retain)
        retain: tuple[Probe, ...] = (*own, *self.retained)
        return MeasureSettings(**given, seed=seed, retain=retain)

    def references(self, dataset: int) -> tuple[str, ...]:
        """Return the texts that RS's word weights are fitted on: those of all cases of the run."""
        if dataset not in self._texts:
            cases = self.cases(dataset, self.config.seeds[0])
            texts = [text for case in cases for request in case for text in request.references]
            self._texts[dataset] = tuple(dict.fromkeys(texts))
        return self._texts[dataset]

    # -- places on disk --------------------------------------------------------------------------

    def folder(self, *parts: str) -> Path:
        """Return a path in the run's directory."""
        if self.directory is None:
            raise ConfigError("This run has no directory.")
        return self.directory.joinpath(*parts)

    def label(self, variant: int) -> str:
        """Return the label of a variant; -1 is the unedited model."""
        return BASE if variant < 0 else self.config.methods[variant].label

    def overrides(self, variant: int, seed: int) -> dict[str, Any]:
        """Return the hyper-parameters a variant is run with, beside the registry's."""
        return {"seed": seed, **self.config.methods[variant].config}


def open_dataset(spec: DatasetSpec, limit: int | None) -> Dataset:
    """Open a dataset, reading no more than `limit` cases where that is enough."""
    from errata.datasets import load

    return load(
        spec.name,
        spec.path,
        split=spec.split,
        start=spec.start,
        limit=None if spec.distinct_subjects else limit,
        skip_bad=spec.skip_bad,
        **spec.options,
    )


def selected_cases(dataset: Dataset, spec: DatasetSpec, limit: int | None) -> list[Case]:
    """Return the first `limit` cases (all when None) that the specification lets through.

    Those of a published format whose file gives them no ids have their places in it for ids: a run
    with another seed, method or form of asking finds the same case under the same name.
    """
    seen: set[str] = set()
    found: list[tuple[int, Case]] = []
    for place, case in dataset.placed_cases(None if spec.distinct_subjects else limit):
        subjects = {request.subject for request in case}
        if not (spec.distinct_subjects and subjects & seen):
            found.append((place, _asked_as(spec, case)))
            if len(found) == limit:
                break
        seen |= subjects
    if spec.name == "jsonl" or any(case[0].case_id is not None for _, case in found):
        return [case for _, case in found]  # these go by ids, or by digests
    return [(case[0].model_copy(update={"case_id": str(place)}),) for place, case in found]


def retained_probes(spec: DatasetSpec) -> list[Probe]:
    """Return what of a dataset no edit may change, with the answers that it has.

    That is the dataset's own list where it has one (`Dataset.retain`), of which `start` and `limit`
    take a part. Else its requests: the true target is the answer, or the target without one.

    Raises `ConfigError` where there is nothing.
    """
    from errata.edits.request import Probe
    from errata.evaluate.questions import old_answers, targets

    # Limited to some cases it would be read no further than those, and its list may stand behind.
    whole = open_dataset(spec.model_copy(update={"start": 0}), None)
    if whole.retain:
        end = None if spec.limit is None else spec.start + spec.limit
        probes = list(whole.retain[spec.start : end])
    else:
        cases = selected_cases(open_dataset(spec, spec.limit), spec, spec.limit)
        probes = [
            Probe(prompt=request.text, answers=old_answers(request) or targets(request))
            for case in cases
            for request in case
        ]
    if not probes:
        raise ConfigError(f"The retained data {spec.title!r} holds no case.")
    return probes


def _titled(title: str, probes: Sequence[Probe]) -> list[Probe]:
    """Return probes whose type is a title; phrasings of one question stay together under it."""
    if not title:
        return list(probes)
    return [
        probe.model_copy(
            update={"type": title, "group": f"{title} {probe.group}" if probe.group else ""}
        )
        for probe in probes
    ]


def _asked_as(spec: DatasetSpec, case: Case) -> Case:
    """Return a case in the form in which the specification asks it."""
    said: dict[str, Any] = {"chat": True} if spec.chat else {}
    if spec.join is not None:
        said["join"] = spec.join
    return tuple(request.model_copy(update=said) for request in case) if said else case


def _retained_as(spec: DatasetSpec, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return a dataset's retained probes in the form in which the specification asks it."""
    from errata.evaluate.retained import RetainedProbe

    return tuple(RetainedProbe.of(probe, spec.join, spec.chat) for probe in probes)


def read_corpus(path: Path) -> list[str]:
    """Read a text file as documents, separated by blank lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the corpus {str(path)!r}: {error}") from error
    documents = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not documents:
        raise ConfigError(f"The corpus {str(path)!r} holds no text.")
    return documents


def case_name(case: Case) -> str:
    """Return a case's id as measurements carry it: its case_id, else part of its digest."""
    return case[0].case_id or case[0].digest[:12]
