"""Changes of model and ledger together: carried out whole, or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.contract.capabilities import (
    check_fingerprint,
    check_superseded,
    conflicts,
    library_versions,
    overlaps,
)
from errata.edits.edit import Edit

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.contract.methods import Methods
    from errata.contract.rules import Guards
    from errata.edits.delta import Delta
    from errata.edits.ledger import Ledger
    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")


@dataclass(frozen=True)
class Task:
    """One computation to carry out: what is asked, of which method.

    Attributes:
        method: its name.
        settings: its hyper-parameters.
        requests: what the method gets at once.
    """

    method: str
    settings: MethodConfig
    requests: Sequence[Request]


class Transactions:
    """Carries out edits on one model and its ledger.

    Args:
        model: the live model.
        ledger: where edits are recorded.
        methods: looks methods up.
        guards: hold what was measured while an edit was applied.
        kinds: delta kinds by name; those of methods are added as they come.
    """

    def __init__(
        self,
        model: Model,
        ledger: Ledger,
        methods: Methods,
        guards: Guards,
        kinds: dict[str, type[Delta]],
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._methods = methods
        self._guards = guards
        self._kinds = kinds
        self._prepared: set[tuple[str, str]] = set()

    def prepare(self, method: str, settings: MethodConfig) -> None:
        """Let a method compute what belongs to the base, once for these hyper-parameters."""
        key = (method, settings.model_dump_json())
        if key not in self._prepared:
            with self._model.base_state():
                manager = self._methods.manager(method)
                manager.prepare(self._model, self._model.corpus or (), settings)
            self._prepared.add(key)

    @contextmanager
    def all_or_nothing(self, touched: list[str] | None = None) -> Iterator[list[str]]:
        """Put the model back when the block fails; yields the list of edit ids it works on.

        A Ctrl-C may come after the ledger's commit and before the block ends, so for the edits
        that the block works on the ledger is asked; all others stay as they were.
        """
        ids = touched if touched is not None else []
        former = self._model.stack.entries
        try:
            yield ids
        except BaseException:
            recorded = set(self._ledger.active_ids())
            entries = {e.edit_id: e for e in (*self._model.stack.entries, *former)}
            kept = {e.edit_id for e in former if e.edit_id not in ids} | (recorded & set(ids))
            self._model.stack.set([entries[i] for i in kept if i in entries])
            raise

    def make(self, task: Task, *, apply: bool, supersede: bool) -> list[Edit]:
        """Compute, check, apply and record the edits of one task.

        With `supersede` the active edits about the same facts are taken off first, and recorded
        as taken off together with the new ones.
        """
        old = self._superseded(task.requests) if supersede else []
        with self.all_or_nothing([edit.id for edit in old]) as touched:
            self._take_off(old)
            extra = {"supersedes": [edit.id for edit in old]} if old else {}
            records = self._compute(task, apply, touched, 0, extra)
            return self._record(records, apply, {edit.id: "supersede" for edit in old})

    def replay(self, old: Sequence[Edit]) -> list[Edit]:
        """Take edits (in ledger order) off, and compute them again one by one on what is left."""
        tasks = []
        for edit in old:
            settings = self._methods.plugin(edit.method).config(**edit.config)
            self.prepare(edit.method, settings)
            tasks.append(Task(edit.method, settings, edit.requests))
        with self.all_or_nothing([edit.id for edit in old]) as touched:
            self._take_off(old)
            records: list[Edit] = []
            for edit, task in zip(old, tasks, strict=True):
                extra = {"rebases": edit.id}
                records += self._compute(task, True, touched, len(records), extra)
            return self._record(records, True, {edit.id: "rebase" for edit in old})

    def exchange(self, off: Sequence[Edit], on: Sequence[Edit]) -> None:
        """Take recorded edits off and put others on, as one change."""
        with self.all_or_nothing([edit.id for edit in (*off, *on)]):
            self._take_off(off)
            for edit in on:
                check_fingerprint(self._model, edit)
                self._methods.manager_of(edit).apply(self._model, edit)
            with self._ledger.transaction():
                self._ledger.deactivate([edit.id for edit in off])
                self._ledger.activate([edit.id for edit in on])

    # -- how -------------------------------------------------------------------------------------

    def _superseded(self, requests: Sequence[Request]) -> list[Edit]:
        """Return the active edits about facts among `requests`, with their deltas."""
        active = self._active()
        wanted = conflicts(requests, active, same_target=True)
        old = [edit for edit in active if edit.id in wanted]
        check_superseded(old, requests)
        return [edit.bind(self._ledger.delta(edit.id)) for edit in old]

    def _take_off(self, edits: Sequence[Edit]) -> None:
        with self._model.stack.deferred():
            for edit in edits:
                self._methods.manager_of(edit).revert(self._model, edit)

    def _compute(
        self, task: Task, apply: bool, touched: list[str], ahead: int, extra: Mapping[str, Any]
    ) -> list[Edit]:
        """Return the task's edits, on the model if `apply`; `ahead` others await their record."""
        model, settings = self._model, task.settings
        manager = self._methods.manager(task.method)
        started = time.perf_counter()
        with model.base_state() if settings.on_base else nullcontext():
            deltas = manager.edit(model, task.requests, settings)
        seconds = (time.perf_counter() - started) / len(deltas)
        self._kinds.update(manager.delta_kinds())
        requests = task.requests
        groups = [[r] for r in requests] if len(deltas) == len(requests) else [list(requests)]
        sequence = self._ledger.next_sequence + ahead
        parents = () if settings.on_base else tuple(model.stack.ids)
        active = self._active()
        records: list[Edit] = []
        for index, (delta, group) in enumerate(zip(deltas, groups, strict=True)):
            record = Edit(
                sequence=sequence + index,
                method=task.method,
                delta_kind=delta.kind,
                requests=tuple(group),
                config=settings.model_dump(mode="json"),
                fingerprint=model.fingerprint_of(delta.parameters),
                parents=parents,
                versions=library_versions(task.method),
                seconds=seconds,
                outcome={
                    **extra,
                    **self._methods.meter.findings,
                    **self._clashes(group, delta, active),
                },
            ).bind(delta)
            touched.append(record.id)
            if apply:
                manager.apply(model, record)
                record = record.bind(delta, outcome={**record.outcome, **self._guards.findings})
                active.append(record)
            records.append(record)
        return records

    def _clashes(
        self, requests: Sequence[Request], delta: Delta, active: Sequence[Edit]
    ) -> dict[str, Any]:
        """Return what the record says of active edits that get in each other's way; warn."""
        found: dict[str, Any] = {}
        clashing = conflicts(requests, active)
        if clashing:
            found["conflicts"] = clashing
            logger.warning(
                "%r says something else than %s about the same fact; both are active.",
                requests[0].text, ", ".join(clashing),
            )  # fmt: skip
        close = overlaps(delta, self._model.stack.entries)
        close = {name: cosine for name, cosine in close.items() if name not in clashing}
        if close:
            found["overlaps"] = close
            logger.warning(
                "%r has nearly the key of %s (whitened cosine up to %.2f): what is written for one "
                "is read for the other.",
                requests[0].text, ", ".join(close), max(close.values()),
            )  # fmt: skip
        return found

    def _record(
        self, records: Sequence[Edit], apply: bool, replaced: Mapping[str, str]
    ) -> list[Edit]:
        """Store the records, and that the replaced edits (id → why) were taken off, as one."""
        with self._ledger.transaction():
            if replaced:
                self._ledger.deactivate(replaced)
            stored = self._ledger.commit_many([(e, e.delta, apply) for e in records])
            for name, why in replaced.items():
                by = [edit.id for edit in stored]
                self._ledger.note(why, {"by": by}, name)
        return [new.bind(old.delta) for new, old in zip(stored, records, strict=True)]

    def _active(self) -> list[Edit]:
        active = set(self._model.stack.ids)
        return [edit for edit in self._ledger.edits() if edit.id in active]
