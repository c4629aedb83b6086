"""The stack: the ordered edits on one live model, always recomputed from the base."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from errata.common.display import Described, plural
from errata.common.floats import wide
from errata.edits import side_branch
from errata.edits.autograd import recording
from errata.edits.delta import attaching
from errata.edits.last_written import LastWritten
from errata.errors import CapabilityError, IntegrityError, LedgerError, UnknownNameError
from errata.model.pristine import same_bits
from errata.model.structure import ABSENT, HOOK_TABLES, Structure, Traits, in_words
from errata.model.task import check_not_compiled

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.edits.delta import Delta, Undo
    from errata.edits.edit import Edit
    from errata.model.answers import Answers
    from errata.model.model import Model

logger = logging.getLogger("errata")
COMPUTING = ("edit", "prepare", "rebase", "resolve")
"""Operations of an editor that run a method's hooks."""
MOST_NAMED = 5
"""Tensors that differ and are named one by one."""


class Stack(Described):
    """What is on the model. Changing it refolds every touched parameter from the base.

    Nothing is ever subtracted. After `set` each parameter equals, bit for bit, base + the fold
    of the active edits in ledger order, accumulated in fp32 (or wider) and cast once; kinds are
    folded one after the other in the order of their names, so the result depends on the set of
    active edits and on nothing that happened before.

    Where the model takes its edits as a side branch (`model.branch`) the weights stay the base's
    and weight edits are hung beside them, computed from the same set of edits.

    Attributes:
        written: what it last wrote, to notice what other code wrote since.
        suspended: how many blocks of `temporarily` there are around what runs now.
        closed: the model may be another editor's: what is on it stays.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.written = LastWritten(model)
        self.suspended = 0
        self.closed = False
        self._entries: list[Edit] = []
        self._undo: list[Undo] = []
        self._bare = Structure(model.module)
        self._hung: Traits = {}  # traits of the module that the active edits changed

    @classmethod
    def on(cls, model: Model) -> Model:
        """Give a model a stack, so that it can be edited, and return it."""
        model.stack = cls(model)
        return model

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "", plural(len(self._entries), "edit")
        for edit in self._entries[:3]:
            yield edit.id, edit.method
        if len(self._entries) > 3:
            yield "", "…"

    # -- reading ---------------------------------------------------------------------------------

    @property
    def entries(self) -> tuple[Edit, ...]:
        """The active edits in ledger order, each with its delta."""
        return tuple(self._entries)

    @property
    def ids(self) -> list[str]:
        """The ids of the active edits in ledger order."""
        return [edit.id for edit in self._entries]

    @property
    def module(self) -> nn.Module:
        """The live module that they are on."""
        return self._model.module

    @property
    def touched(self) -> set[str]:
        """The names of the tensors that the active edits change."""
        return {n for e in self._entries if e.delta.folds for n in e.delta.parameters}

    @property
    def hooks(self) -> list[object]:
        """The hooks that the active edits have on the module, whoever wrote their kinds."""
        return [hook for trait, hook in self._hung.items() if trait.what in HOOK_TABLES]

    def of_kind(self, kind: str) -> list[tuple[str, Delta]]:
        """Return (edit id, delta) of the active edits of one kind, in ledger order."""
        return [(e.id, e.delta) for e in self._entries if e.delta.kind == kind]

    # -- changing --------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep others from running or changing the model in the block; gradients as by default."""
        with self._model.access.changing(), recording():
            yield

    @recording()
    def set(self, entries: Sequence[Edit], *, force: bool = False) -> None:
        """Make exactly these edits active.

        If anything fails half way (out of memory, Ctrl-C, a broken delta) the former edits are
        put back before the error goes on. Raises `IntegrityError`, before anything moves, where
        other code changed what would be overwritten; `force` overwrites it: to take back what
        failed.
        """
        wanted = sorted(entries, key=lambda edit: edit.sequence)
        if [e.id for e in wanted] == self.ids:
            self._entries = wanted  # their records may have been completed
            return
        self._check_open("change what is on the model")
        former = self._entries
        if not force:
            self.written.check(self._rewritten(former, wanted))
        try:
            self._move(former, wanted)
        except BaseException:
            self._move(wanted, former, force=True)
            raise

    @contextmanager
    def temporarily(self, entries: Sequence[Edit]) -> Iterator[None]:
        """Make exactly these edits active for the block; the former ones come back after it.

        No other thread runs or changes the model meanwhile.
        """
        with self._model.access.changing():
            former, over = list(self._entries), False
            try:
                self.set(entries)
                self.suspended += 1
                try:
                    yield
                    over = True
                finally:
                    self.suspended -= 1
            finally:
                self._bring_back(former, force=not over)

    def _bring_back(self, former: Sequence[Edit], *, force: bool) -> None:
        """Make former edits active again, also where a Ctrl-C comes in the middle of it.

        Raises `IntegrityError`, and leaves them off, where other code changed what they write.
        """
        try:
            self.set(former, force=force)
        except IntegrityError:
            raise
        except BaseException:
            self._move(self._entries, former, force=True)  # `set` had put the temporary ones back
            raise

    @recording()
    def restore(self) -> None:
        """Rewrite every tensor from base and fold, whatever was done to the live module."""
        for name, live in self._live().items():
            if live.shape != (former := self._model.pristine[name].shape):
                raise IntegrityError(
                    f"{name!r} has the shape {tuple(live.shape)} now, and had {tuple(former)} when "
                    "errata opened the model: load it again."
                )
        self._detach()
        with torch.no_grad():
            for name, live in self._live().items():
                live.copy_(self.expected(name))
        self.written.note(self._model.parameters)
        self._attach(self._entries)

    # -- checking --------------------------------------------------------------------------------

    def check_free(self, what: str) -> None:
        """Raise unless edits can be made and taken off now.

        `LedgerError` for a closed editor's stack or inside `temporarily`, `IntegrityError` where
        other code changed the model. `what` is the operation. One of `COMPUTING` verifies every
        weight, because what it finds of the base is kept, and that no module was compiled; others
        rely on `set`, which verifies the weights that it rewrites.
        """
        self._check_open(what)
        if self.suspended:
            raise LedgerError(
                f"Cannot {what} inside disabled() or only(): leave the block first, so that "
                "what is recorded is what is on the model."
            )
        self.written.check(read=what in COMPUTING)
        if what in COMPUTING:
            check_not_compiled(self._model.module)
            changed = [t for t in self._foreign() if t.what in ("module", "class")]
            if changed:
                raise IntegrityError(
                    f"Cannot {what}: other code changed {', '.join(map(str, changed[:3]))} since "
                    "errata opened the model. Undo that, or open what the model is now in a new "
                    "editor."
                )

    def check_unchanged(self, bits: Mapping[str, Tensor] | None = None) -> None:
        """Raise `IntegrityError` where other code changed the model.

        `bits`: the present `last_written.hashed` of its parameters, if the caller has them.
        """
        self.written.check(bits=bits)

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise LedgerError(f"Cannot {what}: this editor is closed. Open the model in a new one.")

    def expected(self, name: str) -> Tensor:
        """Return what tensor `name` must be: the base with the active weight edits folded in."""
        return self._fold(name, [] if self._model.branch else self._entries)

    def folded(self, name: str) -> Tensor:
        """Return the base with the active weight edits folded in, wherever they are now."""
        return self._fold(name, self._entries)

    def differing(self, names: Collection[str] | None = None) -> list[str]:
        """Return the names of live tensors (by default of all) that are not what they must be."""
        return [
            name
            for name, live in self._live().items()
            if (names is None or name in names)
            and not same_bits(live.detach(), self.expected(name).to(live.device))
        ]

    def problems(self) -> list[str]:
        """Return, in words, how the live module differs from what the stack says.

        In its tensors, and in what other code changed since the stack was made: hooks, swapped
        modules and parameter objects, flags. What a model notes while it runs does not count.
        """
        try:
            wrong = self.differing()
            found = [f"tensor {name} is not what the stack says" for name in wrong[:MOST_NAMED]]
            if more := len(wrong) - len(found):
                found.append(f"{plural(more, 'more tensor')} differ, of {len(self._live())} in all")
        except IntegrityError as error:
            found = [str(error)]
        return found + [f"{name}: changed by other code" for name in in_words(self._foreign())]

    def _foreign(self) -> Traits:
        """Return the structural changes that errata did not make."""
        now, bare = self._bare.changes(), self._bare.traits
        return {
            trait: value
            for trait in {**now, **self._hung}
            if (value := now.get(trait, bare.get(trait, ABSENT)))
            is not self._hung.get(trait, bare.get(trait, ABSENT))
            and trait.what not in ("attribute", "cache")
        }

    def check_rows(self, named: Collection[str]) -> None:
        """Raise unless the rows of one batch may take different ones among these edits.

        `UnknownNameError` for an id that is not active, `CapabilityError` where edits are folded
        into the weights or act on every row.
        """
        for edit_id in sorted(set(named) - set(self.ids)):
            raise UnknownNameError("active edit", edit_id, self.ids)
        everywhere = [edit.id for edit in self._entries if not edit.delta.folds]
        if everywhere or not self._model.branch:
            raise CapabilityError(
                f"Rows cannot take different edits: {', '.join(everywhere)} act on every row."
                if everywhere
                else "Rows cannot take different edits while these are folded into the weights: "
                "open the model with Editor(…, branch=True)."
            )

    # -- what happens around a prompt ------------------------------------------------------------

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts as the active edits want them to be read, kind by kind."""
        texts = list(prompts)
        for kind, deltas in self._acting("rewrite", self._entries):
            texts = attaching.rewritten(kind, self._model, deltas, texts)
        return texts

    def respond(self, prompts: Sequence[str]) -> list[Answers | None]:
        """Return who answers each prompt in the model's place; None: the model itself.

        Kinds are asked in the order of their names; the first that claims a row has it.
        """
        found: list[Answers | None] = [None] * len(prompts)
        for kind, deltas in self._acting("respond", self._entries):
            for row, answers in enumerate(attaching.responding(kind, self._model, deltas, prompts)):
                found[row] = answers if found[row] is None else found[row]
        return found

    def _acting(
        self, effect: str, entries: Sequence[Edit]
    ) -> list[tuple[type[Delta], list[tuple[str, Delta]]]]:
        kinds: dict[str, list[tuple[str, Delta]]] = defaultdict(list)
        for edit in entries:
            if effect in edit.delta.effects:
                kinds[edit.delta.kind].append((edit.id, edit.delta))
        return [(type(kinds[kind][0][1]), kinds[kind]) for kind in sorted(kinds)]

    # -- how -------------------------------------------------------------------------------------

    def _live(self) -> dict[str, Tensor]:
        return {**self._model.parameters, **self._model.buffers}

    def _rewritten(
        self, before: Sequence[Edit], after: Sequence[Edit], force: bool = False
    ) -> list[str]:
        """Return the names of the parameters that a change to another set of edits rewrites.

        Any change of the stack's make-up for a parameter means folding it again, whole.
        """
        changed = {e.id for e in before} ^ {e.id for e in after}
        names = {
            name
            for e in (*before, *after)
            if not self._model.branch and (force or e.id in changed) and e.delta.folds
            for name in e.delta.parameters
        }
        return sorted(names)

    def _move(self, before: Sequence[Edit], after: Sequence[Edit], force: bool = False) -> None:
        """Bring the model from one set of active edits to another."""
        rehang = force or self._hanging(before) != self._hanging(after)
        folded = {name: self._fold(name, after) for name in self._rewritten(before, after, force)}
        if rehang:
            self._detach()
        with torch.no_grad():
            for name, tensor in folded.items():
                self._model.parameters[name].copy_(tensor)
        self.written.note(folded)
        self._entries = list(after)
        if rehang:
            self._attach(after)

    def _fold(self, name: str, entries: Sequence[Edit]) -> Tensor:
        base = self._model.pristine[name]
        kinds: dict[str, list[Delta]] = defaultdict(list)
        for edit in entries:
            if edit.delta.folds and name in edit.delta.parameters:
                kinds[edit.delta.kind].append(edit.delta)
        if not kinds:
            return base
        if not base.is_floating_point():
            raise CapabilityError(
                f"{name!r} is stored as {base.dtype} (quantised): nothing can be folded into it. "
                "Run the edits beside the weights: Editor(…, branch=True)."
            )
        live = self._model.parameters[name]
        # On the parameter's own device: folding a 7B model's matrices on the CPU takes seconds.
        accumulator = wide(base.to(live.device, copy=True))
        for kind in sorted(kinds):
            attaching.fold_kind(type(kinds[kind][0]), name, accumulator, kinds[kind])
        folded = accumulator.to(base.dtype)  # the one rounding; may overflow in fp16
        sound = torch.isfinite(wide(folded)) | ~torch.isfinite(wide(base)).to(live.device)
        if not bool(sound.all()):
            raise IntegrityError(f"Folding the edits of {name!r} gives NaN or infinite entries.")
        return folded

    def _hanging(self, entries: Sequence[Edit]) -> list[str]:
        """Return the ids of those edits that hang on the module."""
        how = {"attach", "fold"} if self._model.branch else {"attach"}
        return [edit.id for edit in entries if how & edit.delta.effects]

    def _attach(self, entries: Sequence[Edit]) -> None:
        """Hang edits on the module; whatever fails, it is put back as it was before."""
        if not (ids := self._hanging(entries)):
            return
        acting = self._acting("attach", entries)
        beside = [e for e in entries if e.delta.folds] if self._model.branch else []
        check_not_compiled(self._model.module)
        before = Structure(self._model.module)
        try:
            if beside:
                self._undo.append(side_branch.attach(self._model, beside))
            # "adapter" sorts before "codebook": hooks then see the module with adapters in it.
            for kind, deltas in acting:
                if self._undo:  # whose the hooks so far are, for what this kind asks of the base
                    self._hung = before.changes()
                self._undo.append(attaching.attach_kind(kind, self._model, deltas))
            self._undo.append(attaching.keep_from_saving(self._model.module, ids))
        except BaseException:
            try:
                self._detach()
            finally:
                before.restore()
            raise
        self._hung = before.changes()

    def _detach(self) -> None:
        self._hung = {}
        while self._undo:
            self._undo.pop()()
