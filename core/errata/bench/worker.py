"""The worker: one process with one model that carries out units of work and yields their lines."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench import measuring
from errata.bench.askable import check_askable
from errata.bench.editing import FATAL, CaseOutcome, edit_case, error_text, traceback_text
from errata.bench.kept_answers import KeptAnswers
from errata.bench.line_place import LinePlace
from errata.bench.records import case_line, failure_line, state_line
from errata.bench.results import Line
from errata.bench.run_spec import CHUNK, Case, Item, RunSpec
from errata.bench.work_units import WorkUnit, place_of_batch, place_of_case, place_of_state
from errata.contract import plugins
from errata.contract.capabilities import check_capabilities, check_prompts
from errata.editor import Editor
from errata.edits.aim_scores import score_aims
from errata.edits.aims import unmet
from errata.edits.erasures import naming_what_goes
from errata.edits.rendering import rendered
from errata.errors import IntegrityError, RequestError
from errata.evaluate import Baseline

if TYPE_CHECKING:
    from errata.common.progress import Progress
    from errata.evaluate.reader import KnownAnswers

logger = logging.getLogger("errata")
HOLD = 2**31
"""Bytes of reverted deltas after which the model is loaded anew, with an empty ledger."""


class Worker:
    """Measures the base, edits and measures for one run, on one model.

    `errata.bench.dispatch` says which of its methods a unit of work needs.

    Args:
        spec: the run.
        progress: where long work inside a unit reports to.
    """

    def __init__(self, spec: RunSpec, progress: Progress | None = None) -> None:
        self.spec = spec
        self._progress = progress
        self.memory = lru_cache(maxsize=256)(self._memory)
        self._editor: Editor | None = None
        self._held = 0  # bytes of deltas in a ledger in memory
        self._named: dict[tuple[Item, int], Case] = {}
        self._prepared: dict[tuple[int, int], CaseOutcome | None] = {}

    @property
    def editor(self) -> Editor:
        """The editor, by default with a ledger in memory; it loads the model when first needed."""
        if self._editor is None:
            self._editor = self._load(None)
        return self._editor

    @contextmanager
    def ledger(self, folder: Path) -> Iterator[None]:
        """Have an editor on a durable ledger for the block, with the edits that are active there.

        The model is loaded anew: there is never more than one in memory.
        """
        self.close()
        self._editor = self._load(folder)
        try:
            yield
        finally:
            editor, self._editor = self._editor, None
            editor.close()

    def _load(self, folder: Path | None) -> Editor:
        config = self.spec.config
        self._held = 0
        return Editor(
            config.model,
            ledger=folder,
            device=config.device,
            dtype=config.dtype,
            guards=config.guards,
            corpus=self.spec.corpus,
            training=self.spec.training,
            progress=self._progress,
            trust_remote_code=self.spec.trusted,
        )

    def case(self, item: Item, seed: int) -> Case:
        """Return a case as it is edited and measured: its erasures name what the base says.

        Where the base says nothing there, a case stays as it was given, and its edit fails.
        """
        case = self.spec.case(item, seed)
        if not any(request.kind == "erase" and not request.target_true for request in case):
            return case
        key = (item, seed)
        if key not in self._named:
            with suppress(RequestError), self.editor.model.base_state():
                case = tuple(naming_what_goes(self.editor.model, case))
            self._named[key] = case
        return self._named[key]

    def close(self) -> None:
        """Let go of the model; raise `IntegrityError` unless it is bit for bit the base again."""
        editor, self._editor = self._editor, None
        if editor is None:
            return
        with editor:
            wrong = [*editor.model.stack.ids, *editor.model.stack.differing()]
        if wrong:
            raise IntegrityError(
                f"After the run and with every edit off, the model is not its base: "
                f"{', '.join(wrong[:5])} differ. The run's numbers cannot be trusted; a method or "
                "delta kind breaks its contract."
            )

    # -- before anything is edited ---------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """Return what the run's identity takes from the model."""
        model, spec = self.editor.model, self.spec
        check_askable(model, spec)
        variants = []
        for number, variant in enumerate(spec.config.methods):
            config, values = self.editor.configure(
                variant.method, spec.overrides(number, spec.config.seeds[0])
            )
            check_capabilities(
                variant.method, self.editor.registry.method(variant.method), (), model, None
            )
            dumped = config.model_dump(mode="json")
            given = set(variant.config)
            variants.append(
                {
                    "label": variant.label,
                    "method": variant.method,
                    "config": {
                        value.name: {"value": dumped[value.name], "source": value.source}
                        for value in values
                        if value.name != "seed" or "seed" in given
                    },
                    "version": plugins.version(variant.method),
                }
            )
        return {
            "model": {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "model_type": model.anatomy.model_type,
                "parameters": sum(p.numel() for p in model.parameters.values()),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
            },
            "variants": variants,
        }

    def prepare(self, variant: int, seed: int) -> CaseOutcome | None:
        """Compute a method's statistics (or train it) now: no edit's time contains that.

        Where it fails, return what becomes of all of its cases: it is not tried again for each.
        """
        if (variant, seed) not in self._prepared:
            method = self.spec.config.methods[variant].method
            failed = None
            try:
                self.editor.prepare(method, self.spec.overrides(variant, seed))
            except FATAL:
                raise
            except Exception as error:
                failed = CaseOutcome(error=error_text(error), traceback=traceback_text(error))
                label = self.spec.label(variant)
                logger.warning("%s cannot be prepared: its cases fail. %s", label, failed.error)
            self._prepared[variant, seed] = failed
        return self._prepared[variant, seed]

    def base(self, unit: WorkUnit) -> Iterator[Line]:
        """Measure the unedited model on some cases and keep what it answers."""
        spec, (dataset, seed) = self.spec, (unit.dataset, unit.seed)
        protocols, settings = spec.protocols(dataset), spec.settings(dataset, seed)
        items = [item for item in unit.items if self._key(unit, item) not in unit.given_up]
        cases = [self.case(item, seed) for item in items]
        together = not unit.careful and measuring.told_apart_by_name(cases)
        groups = [list(range(len(cases)))] if together else [[i] for i in range(len(cases))]
        kept: list[KnownAnswers] = []
        while groups:
            group = groups.pop(0)
            mine = [cases[i] for i in group]
            started = time.perf_counter()
            try:
                for case in mine:
                    check_prompts(self.editor.model, case)
                memory = KeptAnswers.of(self.editor.model, settings)
                found, _ = measuring.measure_base(self.editor, mine, protocols, settings, memory)
                memory.keep()
            except FATAL:
                raise
            except Exception as error:
                if len(group) > 1:  # find out which of them it is
                    groups = [[i] for i in group] + groups
                    continue
                place = place_of_case(unit, items[group[0]])
                yield from self._unwritten(unit, [failure_line(spec, place, mine[0], error)])
                continue
            kept.append(memory)
            self._keep(dataset, seed, unit.items[0].number // CHUNK, kept)
            share = (time.perf_counter() - started) / len(group)
            yield from self._unwritten(
                unit,
                [
                    case_line(spec, place_of_case(unit, items[i]), case, numbers, None, share)
                    for i, case, numbers in zip(group, mine, found, strict=True)
                ],
            )
        yield from self._given_up(unit)

    def base_state(self, unit: WorkUnit) -> Iterator[Line]:
        """Measure the unedited model as a whole."""
        spec, (dataset, seed) = self.spec, (unit.dataset, unit.seed)
        place = place_of_state(unit, dataset, "base", 0)
        started = time.perf_counter()
        if unit.given_up:
            yield failure_line(spec, place, None, next(iter(unit.given_up.values())))
            return
        try:
            items = [Item(dataset, number) for number in range(len(spec.cases(dataset, seed)))]
            known = self.baseline(seed, items)
            memory = KeptAnswers.of(self.editor.model, known.settings)
            memory.add(known.memory)
            found = measuring.measure_state(
                self.editor,
                [self.case(item, seed) for item in items],
                spec.whole(dataset),
                spec.beside(dataset),
                dataclasses.replace(known, memory=memory),
                unedited=True,
            )
            memory.keep()
        except FATAL:
            raise
        except Exception as error:
            yield failure_line(spec, place, None, error)
            return
        self._keep(dataset, seed, None, [memory.beyond(known.memory)])
        yield state_line(spec, place, found, time.perf_counter() - started)

    def _keep(
        self, dataset: int, seed: int, chunk: int | None, memories: list[KnownAnswers]
    ) -> None:
        path = self._memory_path(dataset, seed, chunk)
        measuring.save_answers(
            path, measuring.joined_answers(memories), self.editor.model.fingerprint
        )
        self.memory.cache_clear()

    def _memory_path(self, dataset: int, seed: int, chunk: int | None) -> Any:
        folder = self.spec.folder("base", f"{self.spec.title(dataset)}-seed{seed}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / ("state.json" if chunk is None else f"{chunk:06d}.json")

    def _memory(self, dataset: int, seed: int, chunk: int | None) -> KnownAnswers:
        path = self._memory_path(dataset, seed, chunk)
        return measuring.load_answers(path, self.editor.model.fingerprint)

    def baseline(self, seed: int, items: Sequence[Item], whole: bool = False) -> Baseline:
        """Return what the base answers to these cases (of one dataset), in a copy of its own."""
        dataset = items[0].dataset
        chunks: list[int | None] = [None] if whole else []
        chunks += sorted({item.number // CHUNK for item in items})
        memories = [self.memory(dataset, seed, chunk) for chunk in chunks]
        return Baseline(
            self.editor.model.fingerprint,
            self.spec.settings(dataset, seed),
            measuring.joined_answers(memories),
        )

    # -- edit, measure, revert -------------------------------------------------------------------

    def together(self, unit: WorkUnit) -> Iterator[Line]:
        """Edit one case or a batch of them on the base, measure, take the edit off again."""
        spec, editor = self.spec, self.editor
        yield from self._given_up(unit)
        good: list[tuple[Item, Case]] = []
        for item in unit.items:
            case = self.case(item, unit.seed)
            problem = self.problem(unit, item)
            if self._key(unit, item) in unit.given_up:
                continue
            if problem:
                line = failure_line(spec, place_of_case(unit, item), case, problem)
                yield from self._unwritten(unit, [line])
            else:
                good.append((item, case))
        if not good:
            return
        outcome = self.edit(unit.variant, unit.seed, [item for item, _ in good])
        try:
            if outcome.error is not None:
                said = outcome.error, outcome.traceback
                lines = [
                    failure_line(spec, place_of_case(unit, item), case, *said)
                    for item, case in good
                ]
                yield from self._unwritten(unit, lines)
            else:
                yield from self._measured(unit, good, outcome)
        finally:
            if outcome.ids:
                editor.revert(*outcome.ids)
            if editor.model.stack.ids:
                raise IntegrityError(
                    f"Edits {', '.join(editor.model.stack.ids)} are on the model after all were "
                    "taken off: the next case would not start from the base."
                )
        self._held += outcome.nbytes
        if self._held > HOLD:  # a ledger in memory keeps the deltas of what was reverted
            self.close()

    def _measured(
        self, unit: WorkUnit, good: Sequence[tuple[Item, Case]], outcome: CaseOutcome
    ) -> Iterator[Line]:
        """Yield the lines of cases whose edit is on the model."""
        spec = self.spec
        for chunk in spec.chunks([item for item, _ in good]):
            yield from self.measured(
                unit,
                [(place_of_case(unit, item), item, outcome) for item in chunk],
            )
        place = place_of_batch(unit)
        if unit.work == "batch" and spec.whole(unit.dataset) and place.key(spec) not in unit.done:
            yield self.state(unit, place, [item for item, _ in good])

    def edit(
        self, variant: int, seed: int, items: Sequence[Item], before: Sequence[str] = ()
    ) -> CaseOutcome:
        """Edit the model with cases together."""
        outcome = self.prepare(variant, seed) or edit_case(
            self.editor,
            [request for item in items for request in self._edited(item, seed, variant)],
            method=self.spec.config.methods[variant].method,
            config=self.spec.overrides(variant, seed),
            before=before,
        )
        return dataclasses.replace(outcome, shared=len(items))

    def right(self, unit: WorkUnit, item: Item) -> bool:
        """Say whether the model as it stands does already what the edit of a case asks for."""
        model = self.editor.model
        requests = rendered(model, self._edited(item, unit.seed, unit.variant))
        return all(aims and not unmet(aims, scores) for aims, scores in score_aims(model, requests))

    def measured(
        self,
        unit: WorkUnit,
        wanted: Sequence[tuple[LinePlace, Item, CaseOutcome]],
    ) -> Iterator[Line]:
        """Measure cases of one dataset together on the model as it stands; yield their lines."""
        spec = self.spec
        items = [item for _, item, _ in wanted]
        cases = [self.case(item, unit.seed) for item in items]
        protocols = spec.protocols(items[0].dataset)
        if len(cases) > 1 and (unit.careful or not measuring.told_apart_by_name(cases)):
            for one in wanted:
                yield from self.measured(unit, [one])
            return
        started = time.perf_counter()
        try:
            baseline = self.baseline(unit.seed, items)
            alone = spec.alone(unit.variant, wanted[0][0].stage)
            found = measuring.measure(self.editor, cases, protocols, baseline, alone=alone)
        except FATAL:
            raise
        except Exception as error:
            if len(cases) > 1:  # find out which of them it is
                for one in wanted:
                    yield from self.measured(unit, [one])
                return
            line = failure_line(spec, wanted[0][0], cases[0], error)
            yield from self._unwritten(unit, [line])
            return
        share = (time.perf_counter() - started) / len(cases)
        lines = [
            case_line(spec, place, case, numbers, None if outcome.right else outcome, share)
            for (place, _, outcome), case, numbers in zip(wanted, cases, found, strict=True)
        ]
        yield from self._unwritten(unit, lines)

    def state(
        self,
        unit: WorkUnit,
        place: LinePlace,
        items: Sequence[Item],
        accurate: Sequence[Item] = (),
    ) -> Line:
        """Measure the model as a whole, as it stands after edits of these cases (of one dataset).

        `accurate`: those of the stream that were right when they came.
        """
        spec = self.spec
        started = time.perf_counter()
        try:
            found = measuring.measure_state(
                self.editor,
                [self.case(item, unit.seed) for item in items],
                spec.whole(place.dataset),
                spec.beside(place.dataset),
                self.baseline(unit.seed, [*items, *accurate], whole=True),
                accurate=[self.case(item, unit.seed) for item in accurate],
            )
        except FATAL:
            raise
        except Exception as error:
            return failure_line(spec, place, None, error)
        return state_line(spec, place, found, time.perf_counter() - started)

    # -- small things ----------------------------------------------------------------------------

    def _edited(self, item: Item, seed: int, variant: int) -> Case:
        return self.spec.edited(self.case(item, seed), item.dataset, variant)

    def problem(self, unit: WorkUnit, item: Item) -> str:
        """Return why a case cannot be carried out, before anything is computed; "" if it can."""
        method = self.spec.config.methods[unit.variant].method
        case = self._edited(item, unit.seed, unit.variant)
        entry = self.editor.registry.method(method)
        try:
            check_capabilities(method, entry, case, self.editor.model, None)
            check_prompts(self.editor.model, case)
        except Exception as error:
            return error_text(error)
        return ""

    def _key(self, unit: WorkUnit, item: Item) -> str:
        return place_of_case(unit, item).key(self.spec)

    def _given_up(self, unit: WorkUnit) -> Iterator[Line]:
        for item in unit.items:
            error = unit.given_up.get(self._key(unit, item))
            if error is not None:
                case = self.spec.case(item, unit.seed)
                yield from self._unwritten(
                    unit, [failure_line(self.spec, place_of_case(unit, item), case, error)]
                )

    @staticmethod
    def _unwritten(unit: WorkUnit, lines: Sequence[Line]) -> Iterator[Line]:
        return (line for line in lines if line["key"] not in unit.done)
