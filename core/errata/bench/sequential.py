"""The sequential regimes: edits stay on the model, and the stream can be taken up anywhere.

A stream has a durable ledger of its own. After each call of the method, with one case or a batch of
them, a note there says what became of it, so that a killed run never computes an edit again; a
measurement that was not written is made again with exactly the edits on the model that were there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from errata.bench.editing import CaseOutcome
from errata.bench.line_place import LinePlace
from errata.bench.records import failure_line
from errata.bench.results import Line, locked
from errata.bench.run_spec import Item, case_name
from errata.bench.work_units import WorkUnit, place_at_checkpoint, place_of_edit, place_of_state
from errata.common.storage import make_folder
from errata.errors import CapabilityError, IntegrityError, RequestError

if TYPE_CHECKING:
    from errata.bench.worker import Worker

NOTE = "bench-case"
PATIENCE = 30.0  # seconds: a worker whose parent was killed ends within a second


def run_stream(worker: Worker, unit: WorkUnit) -> Iterator[Line]:
    """Edit the cases of a stream call by call; measure right after each and at checkpoints."""
    spec = worker.spec
    dataset = "mixed" if unit.dataset < 0 else spec.title(unit.dataset)
    folder = spec.folder("ledgers", f"{spec.label(unit.variant)}-{dataset}-seed{unit.seed}")
    make_folder(folder.parent)
    with locked(folder.with_name(folder.name + ".lock"), wait=PATIENCE):
        with worker.ledger(folder):
            yield from _Stream(worker, unit).lines()


class _Stream:
    """One stream on the editor's present ledger."""

    def __init__(self, worker: Worker, unit: WorkUnit) -> None:
        self.worker, self.unit = worker, unit
        self.spec, self.editor = worker.spec, worker.editor
        self.outcomes = self._recorded()

    def lines(self) -> Iterator[Line]:
        """Yield every line that is not written yet, in order."""
        unit, spec = self.unit, self.spec
        checkpoints = set(spec.checkpoints(len(unit.items)))
        for call in spec.calls(unit.variant, len(unit.items)):
            self._carry_out(call)
            keys = {p: place_of_edit(spec, unit, p).key(spec) for p in call}
            left = {p for p, key in keys.items() if key not in unit.done}
            if left:
                with self._at(call.stop):
                    yield from self._immediate(call, left)
            if call.stop in checkpoints:
                with self._at(call.stop):
                    yield from self._checkpoint(call.stop)

    def _immediate(self, call: range, left: Collection[int]) -> Iterator[Line]:
        """Measure the cases that were edited in one call, those that are left."""
        unit, spec = self.unit, self.spec
        place: dict[Item, LinePlace] = {}
        for position in call:
            item, where = unit.items[position], place_of_edit(spec, unit, position)
            outcome = self.outcomes[position]
            error = outcome.error or unit.given_up.get(where.key(spec))
            if error is None:
                place[item] = where
            elif position in left:
                case = spec.case(item, unit.seed)
                yield failure_line(spec, where, case, error, outcome.traceback)
        for chunk in spec.chunks(list(place)):
            # A chunk is measured as a whole or not at all: numbers depend on the batch.
            if any(place[item].index in left for item in chunk):
                wanted = [(place[item], item, self._outcome(place[item])) for item in chunk]
                yield from self.worker.measured(unit, wanted)

    def _checkpoint(self, step: int) -> Iterator[Line]:
        """Measure every case so far again, and the model as a whole."""
        unit, spec = self.unit, self.spec
        place: dict[Item, int] = {
            item: position
            for position, item in enumerate(unit.items[:step])
            if self.outcomes[position].error is None
        }
        for chunk in spec.chunks(list(place)):
            wanted = [
                (place_at_checkpoint(unit, place[i], step), i, self.outcomes[place[i]])
                for i in chunk
            ]
            keys = [one.key(spec) for one, _, _ in wanted]
            stuck = [
                failure_line(spec, one, spec.case(item, unit.seed), unit.given_up[key])
                for key, (one, item, _) in zip(keys, wanted, strict=True)
                if key in unit.given_up
            ]
            yield from stuck
            # A chunk is measured as a whole or not at all: numbers depend on the batch.
            if any(key not in unit.done for key in keys):
                left = [w for k, w in zip(keys, wanted, strict=True) if k not in unit.given_up]
                yield from self.worker.measured(unit, left)
        for dataset in sorted({item.dataset for item in place}):
            where = place_of_state(unit, dataset, "checkpoint", step)
            key = where.key(spec)
            if spec.whole(dataset) and key not in unit.done:
                if key in unit.given_up:
                    yield failure_line(spec, where, None, unit.given_up[key])
                    continue
                mine = [item for item in place if item.dataset == dataset]
                right = [item for item in mine if self.outcomes[place[item]].right]
                edited = [item for item in mine if item not in right]
                yield self.worker.state(unit, where, edited, right)

    # -- edits -----------------------------------------------------------------------------------

    def _outcome(self, place: LinePlace) -> CaseOutcome:
        assert place.index is not None
        return self.outcomes[place.index]

    def _carry_out(self, call: range) -> None:
        """Edit with the cases of a call together, unless that was done before."""
        if call.start in self.outcomes:
            return
        if call.start != len(self.outcomes):
            raise IntegrityError(
                f"The ledger {self.editor.ledger.where} has no note for case {call.start} of its "
                "stream but notes for later ones. Delete the run's directory and start again."
            )
        unit, spec = self.unit, self.spec
        errors = self._errors(call)
        left = [position for position in call if position not in errors]
        right = [p for p in left if spec.config.only_wrong and self._right(unit.items[p])]
        items = [unit.items[position] for position in left if position not in right]
        outcome = CaseOutcome()
        if items:
            outcome = self.worker.edit(unit.variant, unit.seed, items, self._unclaimed())
        detail = {
            "position": call.start,
            "cases": [case_name(spec.case(unit.items[p], unit.seed)) for p in call],
            "errors": {str(position): error for position, error in errors.items()},
            "right_already": right,
            **outcome.as_json(),
        }
        self.editor.ledger.note(NOTE, detail)
        self.outcomes.update(_shared(call, errors, right, outcome))

    def _right(self, item: Item) -> bool:
        """Say whether the model gets a case right; not where it cannot be asked."""
        try:
            return self.worker.right(self.unit, item)
        except (RequestError, CapabilityError):  # the edit says what is wrong
            return False

    def _errors(self, call: range) -> dict[int, str]:
        """Return the cases of a call that cannot be carried out, and why."""
        unit, spec = self.unit, self.spec
        keys = [place_of_edit(spec, unit, position).key(spec) for position in call]
        fatal = [unit.given_up[key] for key in keys if key in unit.given_up]
        if fatal:  # a call that killed its worker is not retried with fewer cases
            return dict.fromkeys(call, fatal[0])
        if len(call) == 1:
            return {}
        problems = {p: self.worker.problem(unit, unit.items[p]) for p in call}
        return {position: problem for position, problem in problems.items() if problem}

    def _recorded(self) -> dict[int, CaseOutcome]:
        """Return what the ledger's notes say about the cases that were edited before."""
        found: dict[int, CaseOutcome] = {}
        for event in self.editor.ledger.events():
            if event.kind != NOTE:
                continue
            detail = dict(event.detail)
            start, cases = detail.pop("position"), detail.pop("cases")
            errors = {int(position): error for position, error in detail.pop("errors").items()}
            right = detail.pop("right_already", ())  # runs that edit every case had none
            call = range(start, start + len(cases))
            for position, name in zip(call, cases, strict=True):
                case = self.spec.case(self.unit.items[position], self.unit.seed)
                if name != case_name(case):
                    raise IntegrityError(
                        f"The ledger {self.editor.ledger.where} has {name!r} as case {position} "
                        f"of its stream, not {case_name(case)!r}: it is of another run."
                    )
            found.update(_shared(call, errors, right, CaseOutcome.from_json(detail)))
        return found

    def _unclaimed(self) -> list[str]:
        """Return active edits without a note: those of a call that was killed half way."""
        claimed = {edit_id for outcome in self.outcomes.values() for edit_id in outcome.ids}
        return [edit_id for edit_id in self.editor.model.stack.ids if edit_id not in claimed]

    def _at(self, count: int) -> AbstractContextManager[None]:
        """For a block, put the edits on the model that were on it after the first `count` cases."""
        done = [self.outcomes[position] for position in range(count) if position in self.outcomes]
        ids = list(dict.fromkeys(edit_id for outcome in done for edit_id in outcome.ids))
        return nullcontext() if ids == self.editor.model.stack.ids else self.editor.only(*ids)


def _shared(
    call: range, errors: Mapping[int, str], right: Collection[int], outcome: CaseOutcome
) -> dict[int, CaseOutcome]:
    """Return each position's outcome: that of the call, its own error, or that it was right."""
    found = dict.fromkeys(call, outcome)
    found |= {position: CaseOutcome(error=error) for position, error in errors.items()}
    return found | dict.fromkeys(right, CaseOutcome(right=True))
