"""Changes of model and ledger together: carried out whole, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from errata.common.display import plural, shortened
from errata.edits.fingerprint import check_fingerprint
from errata.edits.ledger.model_note import model_of, remember_model
from errata.edits.ledger.schema import VERIFIED
from errata.errors import ErrataError, FingerprintError, IntegrityError, PluginError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from errata.edits.edit import Edit
    from errata.edits.ledger import Ledger
    from errata.edits.stack import Stack
    from errata.model.model import Model

logger = logging.getLogger("errata")

Observe = Callable[[str, Sequence["Edit"]], None]
"""Told "apply" or "revert" and the edits, after the model was changed and before it is recorded."""

OF_ONE_EDIT = (IntegrityError, PluginError, StorageError)
"""Errors of putting edits on that concern one edit, not the model."""


class Transactions:
    """Changes of one model and its ledger.

    Args:
        model: the live model.
        stack: the edits on it.
        ledger: where edits are recorded.
        observe: hears of every change.

    Attributes:
        damaged: id → reason of active edits that could not be put on the model.
    """

    def __init__(self, model: Model, stack: Stack, ledger: Ledger, observe: Observe) -> None:
        self._model = model
        self._stack = stack
        self._ledger = ledger
        self._observe = observe
        self.damaged: dict[str, str] = {}
        self._named = False  # whether the ledger was told what opens the model

    @contextmanager
    def all_or_nothing(self, touched: Collection[str]) -> Iterator[None]:
        """Put the model back when the block fails.

        A Ctrl-C may come after the ledger's commit and before the block ends, so for the edits
        that the block works on (`touched`, which may grow) the ledger is asked; all others stay
        as they were.
        """
        former = self._stack.entries
        try:
            yield
        except BaseException:
            recorded = set(self._ledger.active_ids())
            entries = {e.id: e for e in (*self._stack.entries, *former)}
            kept = {e.id for e in former if e.id not in touched} | (recorded & set(touched))
            self._stack.set([entries[i] for i in entries if i in kept], force=True)
            raise

    def put_on(self, edits: Sequence[Edit]) -> None:
        """Put edits on the model, not yet in the ledger; inside `all_or_nothing`."""
        if edits:
            self._stack.set([*self._stack.entries, *edits])
            self._observe("apply", edits)

    def take_off(self, edits: Sequence[Edit]) -> None:
        """Take edits off the model, not yet in the ledger; inside `all_or_nothing`."""
        if edits:
            gone = {edit.id for edit in edits}
            self._stack.set([edit for edit in self._stack.entries if edit.id not in gone])
            self._observe("revert", edits)

    def record(
        self, new: Sequence[Edit], *, active: bool, replaced: Mapping[str, str] | None = None
    ) -> list[Edit]:
        """Store new edits, and that they replaced others (id → why), as one; return them.

        The stack then holds the records as they were stored.
        """
        with self._ledger.transaction():
            self._name_model()
            if replaced:
                self._ledger.deactivate(replaced)
            stored = self._ledger.commit([(edit, edit.delta, active) for edit in new])
            instead: dict[str | None, list[str]] = {}
            for edit in stored:
                for name in (*edit.outcome.supersedes, edit.outcome.rebases):
                    instead.setdefault(name, []).append(edit.id)
            for name, why in (replaced or {}).items():
                self._ledger.note(why, {"by": instead.get(name, [])}, name)
        self._named = True
        bound = [one.bind(edit.delta) for one, edit in zip(stored, new, strict=True)]
        if active:
            complete = {edit.id: edit for edit in bound}
            self._stack.set([complete.get(edit.id, edit) for edit in self._stack.entries])
        return bound

    def import_(self, path: Path) -> list[Edit]:
        """Store the edits of an exported file and the artifacts that it carries; return them.

        Raises `FingerprintError` for another model's edits, `IntegrityError` for a damaged file.
        """
        carried: dict[str, bytes] = {}
        pairs = self._ledger.read_export(path, carried)
        for edit, delta in pairs:
            check_fingerprint(self._model, edit.bind(delta), carried)
        with self._ledger.transaction():
            self._name_model()
            records = self._ledger.import_(path, pairs)
            self._model.artifacts.take(carried)
        return records

    def apply(self, edits: Sequence[Edit], files: Sequence[Path] = ()) -> list[Edit]:
        """Put on edits that are off, and those of exported files that are, as one; return them.

        The files' edits are stored; says how many of them are on already. Raises as `import_` does.
        """
        wanted = {edit.id: edit for edit in edits}
        ids: list[str] = []
        with self.all_or_nothing(ids), self._ledger.transaction():
            on, there = set(self._stack.ids), []
            for path in files:
                taken = self.import_(path)
                off = [edit for edit in taken if edit.id not in on]
                wanted |= {edit.id: self._ledger.bound(edit) for edit in off}
                there.append((path, len(taken) - len(off), plural(len(taken), "edit")))
            ids += wanted
            self.exchange([], list(wanted.values()))
        for path, number, count in there:
            if number:
                logger.warning("%s: %d of %s were on the model already.", path, number, count)
        return list(wanted.values())

    def _name_model(self) -> None:
        """Tell the ledger what opens the model, just before the first edit that it gets from here.

        So the model of an edit is the one named last before it.
        """
        if not (self._named or self._model.opened_as is None):
            remember_model(self._ledger, *self._model.opened_as)

    def exchange(self, off: Sequence[Edit], on: Sequence[Edit]) -> None:
        """Take recorded edits off and put others on, as one change.

        An edit whose file is lost can be taken off, too. A damaged one, which the ledger has as
        active, can be put on once it is repaired.
        """
        self._check(on)
        before = set(self._ledger.stale_ids())
        with self.all_or_nothing([edit.id for edit in (*off, *on)]):
            gone = {edit.id for edit in off}
            kept = [edit for edit in self._stack.entries if edit.id not in gone]
            self._stack.set([*kept, *on])
            if off:
                self._observe("revert", off)
            if on:
                self._observe("apply", on)
            with self._ledger.transaction():
                self._ledger.deactivate(gone)
                self._ledger.activate([e.id for e in on if not self._ledger.is_active(e.id)])
            for edit in (*off, *on):
                self.damaged.pop(edit.id, None)
        if stale := [name for name in self._ledger.stale_ids() if name not in before]:
            logger.warning(
                "Stale: %s. Computed on top of edits that are off; `rebase` computes them again.",
                shortened(", ".join(stale)),
            )

    def reconcile(self) -> None:
        """Make the model what the ledger says, as far as each edit can be put on.

        `damaged` then has the others: those whose file or artifact is lost or damaged, and those
        whose kind does not load or fails.

        Raises:
            FingerprintError: an edit was made for another model.
        """
        recorded = set(self._ledger.active_ids())
        kept = [edit for edit in self._stack.entries if edit.id in recorded]
        new, damaged = self._ledger.read_active(known={edit.id for edit in kept})
        remembered = model_of(self._ledger) if new else {}
        sound: list[Edit] = []
        for edit in new:
            try:
                check_fingerprint(self._model, edit, remembered=remembered)
            except FingerprintError as error:
                owner = remembered.get("name", "another model")
                if self._model.opened_as and owner == self._model.opened_as[0]:
                    raise  # the same place: its weights changed, or the dtype is another
                raise FingerprintError(
                    f"{error} The ledger {self._ledger.where} has active edits of {owner}: open "
                    "that model, give this one another ledger, or revert them first."
                ) from error
            except (IntegrityError, StorageError, PluginError) as error:
                damaged[edit.id] = str(error)
            else:
                sound.append(edit)
        damaged.update(self._put_on_each(kept, sound))
        for edit_id, why in damaged.items():
            text = "Edit %s is not on the model (reverting it retires it): %s"
            logger.warning(text, edit_id, why, extra=VERIFIED)
        self.damaged.clear()
        self.damaged.update(damaged)

    def _put_on_each(self, kept: Sequence[Edit], new: Sequence[Edit]) -> dict[str, str]:
        """Put `new` on beside `kept`; return id → reason of those that cannot be.

        All at once; where that fails, by halves: few tries find one bad edit among many. What is
        wrong with the model itself is raised.
        """
        failed: dict[str, str] = {}
        on = list(kept)
        waiting = [list(new)]
        while waiting:
            some = waiting.pop()
            try:
                self._stack.set([*on, *some])
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if isinstance(error, ErrataError) and not isinstance(error, OF_ONE_EDIT):
                    raise
                self._stack.check_unchanged()  # other code changed the model: no edit's fault
                self._stack.set(on)
                if not some:
                    raise
                if len(some) == 1:
                    kind = "" if isinstance(error, ErrataError) else f"{type(error).__name__}: "
                    failed[some[0].id] = f"{kind}{error}"
                else:
                    middle = len(some) // 2
                    waiting += [some[middle:], some[:middle]]
            else:
                on += some
        return failed

    def _check(self, edits: Sequence[Edit]) -> None:
        """Raise as `check_fingerprint` does unless recorded edits were made for this model."""
        remembered = model_of(self._ledger) if edits else {}
        for edit in edits:
            check_fingerprint(self._model, edit, remembered=remembered)
