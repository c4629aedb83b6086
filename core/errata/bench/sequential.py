"""The sequential regimes: edits stay on the model, and the stream can be taken up anywhere.

A stream has a durable ledger of its own. After each call of the method, with one case or a batch of
them, a note there says what became of it, so that a killed run never computes an edit again; a
measurement that was not written is made again with exactly the edits on the model that were there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from errata.bench.editing import Outcome
from errata.bench.records import Place, failure_line
from errata.bench.results import Line, locked
from errata.bench.run_spec import Item, name_of
from errata.bench.work_units import Task, immediate_key, key_of
from errata.errors import IntegrityError
from errata.model.storage import make_folder

if TYPE_CHECKING:
    from errata.bench.worker import Worker

NOTE = "bench-case"
PATIENCE = 30.0  # seconds: a worker whose parent was killed ends within a second


def run_stream(worker: Worker, task: Task) -> Iterator[Line]:
    """Edit the cases of a stream call by call; measure right after each and at checkpoints."""
    job = worker.job
    dataset = "mixed" if task.dataset < 0 else job.title(task.dataset)
    folder = job.folder("ledgers", f"{job.label(task.variant)}-{dataset}-seed{task.seed}")
    make_folder(folder.parent)
    with locked(folder.with_name(folder.name + ".lock"), wait=PATIENCE):
        with worker.ledger(folder):
            yield from _Stream(worker, task).lines()


class _Stream:
    """One stream on the editor's present ledger."""

    def __init__(self, worker: Worker, task: Task) -> None:
        self.worker, self.task = worker, task
        self.job, self.editor = worker.job, worker.editor
        self.outcomes = self._recorded()

    def lines(self) -> Iterator[Line]:
        """Yield every line that is not written yet, in order."""
        task, job = self.task, self.job
        checkpoints = set(job.checkpoints(len(task.items)))
        for call in job.calls(task.variant, len(task.items)):
            self._carry_out(call)
            left = {p for p in call if immediate_key(job, task, p) not in task.done}
            if left:
                with self._at(call.stop):
                    yield from self._immediate(call, left)
            if call.stop in checkpoints:
                with self._at(call.stop):
                    yield from self._checkpoint(call.stop)

    def _immediate(self, call: range, left: Collection[int]) -> Iterator[Line]:
        """Measure the cases that were edited in one call, those that are left."""
        task, job = self.task, self.job
        place: dict[Item, Place] = {}
        for position in call:
            item, key = task.items[position], immediate_key(job, task, position)
            where = Place(task.variant, item.dataset, task.seed, "immediate", call.stop, position)
            error = self.outcomes[position].error or task.given_up.get(key)
            if error is None:
                place[item] = where
            elif position in left:
                yield failure_line(job, where, job.case(item, task.seed), error)
        for chunk in job.chunks(list(place)):
            # All of a chunk or none: what is measured together is part of the number.
            if any(place[item].index in left for item in chunk):
                wanted = [(place[item], item, self._outcome(place[item])) for item in chunk]
                yield from self.worker.measured(task, wanted)

    def _checkpoint(self, step: int) -> Iterator[Line]:
        """Measure every case so far again, and the model as a whole."""
        task, job = self.task, self.job
        place: dict[Item, int] = {
            item: position
            for position, item in enumerate(task.items[:step])
            if self.outcomes[position].error is None
        }
        for chunk in job.chunks(list(place)):
            wanted = [
                (
                    Place(task.variant, i.dataset, task.seed, "checkpoint", step, place[i]),
                    i,
                    self.outcomes[place[i]],
                )
                for i in chunk
            ]
            keys = [
                key_of(job, task.variant, one.dataset, task.seed, "checkpoint", step, one.index)
                for one, _, _ in wanted
            ]
            stuck = [
                failure_line(job, one, job.case(item, task.seed), task.given_up[key])
                for key, (one, item, _) in zip(keys, wanted, strict=True)
                if key in task.given_up
            ]
            yield from stuck
            # All of a chunk or none: what is measured together is part of the number.
            if any(key not in task.done for key in keys):
                left = [w for k, w in zip(keys, wanted, strict=True) if k not in task.given_up]
                yield from self.worker.measured(task, left)
        for dataset in sorted({item.dataset for item in place}):
            key = key_of(job, task.variant, dataset, task.seed, "checkpoint", step, None)
            if job.whole(dataset) and key not in task.done:
                where = Place(task.variant, dataset, task.seed, "checkpoint", step, None)
                if key in task.given_up:
                    yield failure_line(job, where, None, task.given_up[key])
                    continue
                mine = [item for item in place if item.dataset == dataset]
                yield self.worker.state(task, where, mine)

    # -- edits -----------------------------------------------------------------------------------

    def _outcome(self, place: Place) -> Outcome:
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
        task, job = self.task, self.job
        errors = self._errors(call)
        items = [task.items[position] for position in call if position not in errors]
        outcome = Outcome()
        if items:
            outcome = self.worker.edit(task.variant, task.seed, items, self._unclaimed())
        detail = {
            "position": call.start,
            "cases": [name_of(job.case(task.items[p], task.seed)) for p in call],
            "errors": {str(position): error for position, error in errors.items()},
            **outcome.as_json(),
        }
        self.editor.ledger.note(NOTE, detail)
        self.outcomes.update(_shared(call, errors, outcome))

    def _errors(self, call: range) -> dict[int, str]:
        """Return the cases of a call that cannot be carried out, and why."""
        task, job = self.task, self.job
        keys = {position: immediate_key(job, task, position) for position in call}
        fatal = [task.given_up[key] for key in keys.values() if key in task.given_up]
        if fatal:  # what kills its worker is not tried again without one of its cases
            return dict.fromkeys(call, fatal[0])
        if len(call) == 1:
            return {}
        problems = {p: self.worker.problem(task, task.items[p]) for p in call}
        return {position: problem for position, problem in problems.items() if problem}

    def _recorded(self) -> dict[int, Outcome]:
        """Return what the ledger's notes say about the cases that were edited before."""
        found: dict[int, Outcome] = {}
        for event in self.editor.ledger.events():
            if event.kind != NOTE:
                continue
            detail = dict(event.detail)
            start, cases = detail.pop("position"), detail.pop("cases")
            errors = {int(position): error for position, error in detail.pop("errors").items()}
            call = range(start, start + len(cases))
            for position, name in zip(call, cases, strict=True):
                case = self.job.case(self.task.items[position], self.task.seed)
                if name != name_of(case):
                    raise IntegrityError(
                        f"The ledger {self.editor.ledger.where} has {name!r} as case {position} "
                        f"of its stream, not {name_of(case)!r}: it is of another run."
                    )
            found.update(_shared(call, errors, Outcome.from_json(detail)))
        return found

    def _unclaimed(self) -> list[str]:
        """Return active edits that no note speaks of: of the call that was killed half way."""
        claimed = {edit_id for outcome in self.outcomes.values() for edit_id in outcome.ids}
        return [edit_id for edit_id in self.editor.model.stack.ids if edit_id not in claimed]

    def _at(self, count: int) -> AbstractContextManager[None]:
        """Have the edits on the model that were there when so many cases had been edited."""
        done = [self.outcomes[position] for position in range(count) if position in self.outcomes]
        ids = list(dict.fromkeys(edit_id for outcome in done for edit_id in outcome.ids))
        return nullcontext() if ids == self.editor.model.stack.ids else self.editor.only(*ids)


def _shared(call: range, errors: Mapping[int, str], outcome: Outcome) -> dict[int, Outcome]:
    """Return each position's outcome: that of the call, or its own error."""
    return {p: Outcome(error=errors[p]) if p in errors else outcome for p in call}
