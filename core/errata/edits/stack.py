"""The stack: the ordered edits on one live model, always recomputed from the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import CapabilityError, IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta, Undo
    from errata.model.model import Model


class Entry(NamedTuple):
    """One active edit: its place in the ledger, its id and its delta."""

    sequence: int
    edit_id: str
    delta: Delta


class Stack:
    """What is on the model. Changing it refolds every touched parameter from the base.

    Nothing is ever subtracted. After `set` each parameter equals, bit for bit, base + the fold
    of the active edits in ledger order, accumulated in fp32 (or wider) and cast once; kinds are
    folded one after the other in the order of their names, so the result depends on the set of
    active edits and on nothing that happened before.

    Where the model takes its edits as a side branch (`model.branch`) the weights stay the base's
    and weight edits are hung beside them, computed from the same set of edits.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._entries: list[Entry] = []
        self._undo: list[Undo] = []
        self._pending: list[Entry] | None = None

    # -- reading ---------------------------------------------------------------------------------

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The active edits in ledger order."""
        return tuple(self._entries)

    @property
    def ids(self) -> list[str]:
        """The ids of the active edits in ledger order."""
        return [entry.edit_id for entry in self._entries]

    @property
    def touched(self) -> set[str]:
        """The names of the tensors that the active edits change."""
        return {n for e in self._entries if not e.delta.runtime for n in e.delta.parameters}

    def of_kind(self, kind: str) -> list[tuple[str, Delta]]:
        """Return (edit id, delta) of the active edits of one kind, in ledger order."""
        return [(e.edit_id, e.delta) for e in self._entries if e.delta.kind == kind]

    # -- changing --------------------------------------------------------------------------------

    def set(self, entries: Sequence[Entry]) -> None:
        """Make exactly these edits active.

        If anything fails half way (out of memory, Ctrl-C, a broken delta) the former edits are
        put back before the error goes on.
        """
        wanted = sorted(entries, key=lambda entry: entry.sequence)
        if [e.edit_id for e in wanted] == self.ids:
            return
        former = self._entries
        try:
            self._move(former, wanted)
        except BaseException:
            self._move(wanted, former, force=True)
            raise

    def add(self, entry: Entry) -> None:
        """Make one more edit active."""
        self._change(lambda entries: [*entries, entry])

    def remove(self, edit_id: str) -> None:
        """Take one edit off, wherever it is in the order."""
        self._change(lambda entries: [e for e in entries if e.edit_id != edit_id])

    @contextmanager
    def temporarily(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Make exactly these edits active for the block; the former ones come back after it."""
        former = list(self._entries)
        self.set(entries)
        try:
            yield
        finally:
            self.set(former)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Collect the adds and removes of a block and carry them out at once, at its end."""
        if self._pending is not None:  # already inside a deferred block
            yield
            return
        self._pending = list(self._entries)
        try:
            yield
            wanted = self._pending
        finally:
            self._pending = None
        self.set(wanted)

    def restore(self) -> None:
        """Rewrite every tensor from base and fold, whatever was done to the live module."""
        self._detach()
        with torch.no_grad():
            for name, live in self._live().items():
                live.copy_(self.expected(name))
        self._attach(self._entries)

    # -- checking --------------------------------------------------------------------------------

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
            and not torch.equal(live.detach(), self.expected(name).to(live.device))
        ]

    # -- how -------------------------------------------------------------------------------------

    def _change(self, how: Callable[[list[Entry]], list[Entry]]) -> None:
        if self._pending is not None:
            self._pending = how(self._pending)
        else:
            self.set(how(self._entries))

    def _live(self) -> dict[str, Tensor]:
        return {**self._model.parameters, **self._model.buffers}

    def _move(self, before: Sequence[Entry], after: Sequence[Entry], force: bool = False) -> None:
        """Bring the model from one set of active edits to another."""
        beside = self._model.branch
        hung_before = [e.edit_id for e in before if e.delta.runtime or beside]
        hung_after = [e.edit_id for e in after if e.delta.runtime or beside]
        rehang = force or hung_before != hung_after
        # Any change of the stack's make-up for a parameter means folding it again, whole.
        changed = {e.edit_id for e in before} ^ {e.edit_id for e in after}
        touched = {
            name
            for e in (*before, *after)
            if not (e.delta.runtime or beside) and (force or e.edit_id in changed)
            for name in e.delta.parameters
        }
        folded = {name: self._fold(name, after) for name in sorted(touched)}
        if rehang:
            self._detach()
        with torch.no_grad():
            for name, tensor in folded.items():
                self._model.parameters[name].copy_(tensor)
        self._entries = list(after)
        if rehang:
            self._attach(after)

    def _fold(self, name: str, entries: Sequence[Entry]) -> Tensor:
        base = self._model.pristine[name]
        kinds: dict[str, list[Delta]] = defaultdict(list)
        for entry in entries:
            if not entry.delta.runtime and name in entry.delta.parameters:
                kinds[entry.delta.kind].append(entry.delta)
        if not kinds:
            return base
        if not base.is_floating_point():
            raise CapabilityError(
                f"{name!r} is stored as {base.dtype} (quantised): nothing can be folded into it. "
                "Run the edits beside the weights: Editor(…, branch=True)."
            )
        live = self._model.parameters[name]
        wide = torch.promote_types(base.dtype, torch.float32)
        # On the parameter's own device: folding a 7B model's matrices on the CPU takes seconds.
        accumulator = base.to(device=live.device, dtype=wide, copy=True)
        for kind in sorted(kinds):
            type(kinds[kind][0]).fold(name, accumulator, kinds[kind])
        folded = accumulator.to(base.dtype)  # the one rounding; may overflow in fp16
        if not bool(torch.isfinite(folded).all()):
            raise IntegrityError(f"Folding the edits of {name!r} gives NaN or infinite entries.")
        return folded

    def _attach(self, entries: Sequence[Entry]) -> None:
        if self._model.branch:
            from errata.edits import side_branch

            weights = [entry for entry in entries if not entry.delta.runtime]
            self._undo.append(side_branch.attach(self._model, weights))
        kinds: dict[str, list[tuple[str, Delta]]] = defaultdict(list)
        for entry in entries:
            if entry.delta.runtime:
                kinds[entry.delta.kind].append((entry.edit_id, entry.delta))
        # "adapter" sorts before "codebook": hooks then see the module with adapters in it.
        for kind in sorted(kinds):
            self._undo.append(type(kinds[kind][0][1]).attach(self._model, kinds[kind]))

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()
