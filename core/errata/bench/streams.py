"""The sequential regimes: edits stay on the model, and the stream can be taken up anywhere.

A stream has a durable ledger of its own. After each case a note there says what became of it, so
that a killed run never computes an edit again; a measurement that was not written is made again
with exactly the edits on the model that were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from errata.bench.editing import Outcome
from errata.bench.job import Item, name_of
from errata.bench.lines import Place, failure_line
from errata.bench.results import Line, locked
from errata.bench.tasks import Task, immediate_key, key_of
from errata.blobs import make_folder
from errata.errors import IntegrityError

if TYPE_CHECKING:
    from errata.bench.worker import Worker

NOTE = "bench-case"
PATIENCE = 30.0  # seconds: a worker whose parent was killed ends within a second


def run_stream(worker: Worker, task: Task) -> Iterator[Line]:
    """Edit the cases of a stream one after the other; measure at once and at checkpoints."""
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
        for position, item in enumerate(task.items):
            outcome = self._outcome(position, item)
            place = Place(
                task.variant, item.dataset, task.seed, "immediate", position + 1, position
            )
            if immediate_key(job, task, position) not in task.done:
                if outcome.error is not None:
                    case = job.case(item, task.seed)
                    yield failure_line(job, place, case, outcome.error)
                else:
                    with self._at(position):
                        yield from self.worker.measured(task, [(place, item, outcome)])
            if position + 1 in checkpoints:
                with self._at(position):
                    yield from self._checkpoint(position + 1)

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

    def _outcome(self, position: int, item: Item) -> Outcome:
        """Return what became of a case's edit, making it if that was not done before."""
        if position in self.outcomes:
            return self.outcomes[position]
        if position != len(self.outcomes):
            raise IntegrityError(
                f"The ledger {self.editor.ledger.where} has no note for case {position} of its "
                "stream but notes for later ones. Delete the run's directory and start again."
            )
        task, job = self.task, self.job
        case = job.case(item, task.seed)
        key = immediate_key(job, task, position)
        if key in task.given_up:
            outcome = Outcome(error=task.given_up[key])
        else:
            outcome = self.worker.edit(task.variant, task.seed, [item], self._unclaimed())
        self.editor.ledger.note(
            NOTE, {"position": position, "case_id": name_of(case), **outcome.as_json()}
        )
        self.outcomes[position] = outcome
        return outcome

    def _recorded(self) -> dict[int, Outcome]:
        """Return what the ledger's notes say about the cases that were edited before."""
        found: dict[int, Outcome] = {}
        for event in self.editor.ledger.events():
            if event.kind == NOTE:
                detail = dict(event.detail)
                position, case_id = detail.pop("position"), detail.pop("case_id")
                case = self.job.case(self.task.items[position], self.task.seed)
                if case_id != name_of(case):
                    raise IntegrityError(
                        f"The ledger {self.editor.ledger.where} has {case_id!r} as case "
                        f"{position} of its stream, not {name_of(case)!r}: it is of another run."
                    )
                found[position] = Outcome.from_json(detail)
        return found

    def _unclaimed(self) -> list[str]:
        """Return active edits that no note speaks of: of the case that was killed half way."""
        claimed = {edit_id for outcome in self.outcomes.values() for edit_id in outcome.ids}
        return [edit_id for edit_id in self.editor.model.stack.ids if edit_id not in claimed]

    def _at(self, position: int) -> AbstractContextManager[None]:
        """Have the edits on the model that were there right after the case at a position."""
        ids = [
            edit_id
            for index in range(position + 1)
            if index in self.outcomes
            for edit_id in self.outcomes[index].ids
        ]
        return nullcontext() if ids == self.editor.model.stack.ids else self.editor.only(*ids)
