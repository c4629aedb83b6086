"""One call of `edit`: compute all deltas, fold once, check once on the final state, commit once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from errata.contract import plugins
from errata.edits.clashes import Clashes, check_superseded, share_a_fact
from errata.edits.edit import Edit
from errata.edits.erasures import naming_what_goes
from errata.edits.outcome import Outcome
from errata.edits.staleness import computed_on, stale_ids
from errata.errors import EditRefused, ErrataError, PluginError, first_few

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.contract.guards import Guards
    from errata.contract.methods import Methods
    from errata.edits.delta import Delta
    from errata.edits.ledger import Ledger
    from errata.edits.request import Request
    from errata.edits.stack import Stack
    from errata.edits.transaction import Transactions
    from errata.model.model import Model

logger = logging.getLogger("errata")

SUPERSEDED = "supersede"
"""Why an edit came off: for one about the same fact."""


@dataclass(frozen=True)
class EditCall:
    """A call of one method: its configuration and the requests.

    Attributes:
        method: its name.
        config: its hyper-parameters, resolved for the model.
        batches: the requests, as the method gets them together.
        rebases: id of the edit that this one replaces.
        solved: the recorded edit whose keys and residuals are solved again; None: computed anew.
    """

    method: str
    config: MethodConfig
    batches: Sequence[Sequence[Request]]
    rebases: str | None = None
    solved: Edit | None = None

    def each(self) -> list[EditCall]:
        """Return a call for every batch."""
        return [replace(self, batches=[batch]) for batch in self.batches]

    def halves(self) -> list[EditCall]:
        """Return two calls with half of the requests each; none for a single request."""
        requests = [request for batch in self.batches for request in batch]
        middle = len(requests) // 2
        parts = (requests[:middle], requests[middle:])
        return [replace(self, batches=[part]) for part in parts] if middle else []


@dataclass
class _Making:
    """Edits in the making, all of them or none.

    Attributes:
        calls: what is computed, in order.
        old: active edits that come off first.
        replaced: why, by the id of each.
        apply: the new edits are put on the model.
        new: those that are made so far, not recorded yet.
        touched: ids of all edits that this works on.
        apart: each request of the batch computed last has an edit of its own.
    """

    calls: Sequence[EditCall]
    old: Sequence[Edit]
    replaced: Mapping[str, str]
    apply: bool
    new: list[Edit] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    apart: bool = False

    def requests(self) -> list[Request]:
        """Return what is asked for."""
        return [r for call in self.calls for batch in call.batches for r in batch]

    def divisible(self) -> bool:
        """Say whether the requests can be made in parts, each with an edit of its own.

        An edit of several requests can only be superseded by a call about all of them.
        """
        return (
            self.apart
            and len(self.requests()) > 1
            and all(len(edit.requests) == 1 for edit in self.old)
        )


class Editing:
    """Carries calls out on one model.

    Args:
        model: the live model.
        stack: the edits on it.
        ledger: where they are recorded.
        methods: computes deltas.
        guards: checks them.
        transactions: changes model and ledger together.
    """

    def __init__(
        self,
        model: Model,
        stack: Stack,
        ledger: Ledger,
        methods: Methods,
        guards: Guards,
        transactions: Transactions,
    ) -> None:
        self._model = model
        self._stack = stack
        self._ledger = ledger
        self._methods = methods
        self._guards = guards
        self._transactions = transactions

    def make(
        self, calls: Sequence[EditCall], *, apply: bool, supersede: bool, skip_refused: bool
    ) -> list[Edit]:
        """Make calls one after the other, each by itself, and record what guards refuse.

        The edits of a call are computed, checked, applied and recorded all, or none. With
        `supersede` the active edits about the same facts are taken off first, and recorded as taken
        off together with the new ones.

        With `skip_refused` a refused call is tried again in halves, where each of its requests has
        an edit of its own, so that only those at fault are left out. An error holds the edits of
        the calls before it, as `done`.
        """
        done: list[Edit] = []
        waiting = list(reversed(calls))
        while waiting:
            call = waiting.pop()
            try:
                making = self._making(call, apply=apply, supersede=supersede)
                try:
                    done += self._carry_out(making)
                except EditRefused as error:
                    requests = making.requests()
                    if skip_refused and making.divisible():
                        text = "Of %d requests some are refused: trying halves."
                        logger.info(text, len(requests))
                        waiting += reversed(call.halves())
                        continue
                    self._ledger.refuse(
                        method=call.method,
                        requests=requests,
                        config=call.config.model_dump(mode="json"),
                        reason=error.reason,
                        measured=error.measured,
                    )
                    error.recorded = True
                    if not skip_refused:
                        raise
                    logger.warning("%s", error)
            except ErrataError as error:
                error.done = list(done)
                raise
        return done

    def stale(self) -> list[Edit]:
        """Return the edits made on top of edits that are off now, and all made on top of those.

        An edit that is active in the ledger and cannot be read, because its plugin or its file is
        missing, was not taken off: what was made on top of it is not stale.
        """
        entries, there = self._stack.entries, set(self._ledger.active_ids())
        found: set[str] = set()
        while more := set(stale_ids(entries, there)) - found:
            found |= more
            there -= more
        return [edit for edit in entries if edit.id in found]

    def replay(self, old: Sequence[Edit]) -> list[Edit]:
        """Take edits (in ledger order) off, and compute them again one by one on what is left."""
        calls = []
        for edit in old:
            config = self._methods.recorded(edit)
            self._methods.prepare(edit.method, config)
            calls.append(EditCall(edit.method, config, [list(edit.requests)], rebases=edit.id))
        return self._carry_out(_Making(calls, old, {edit.id: "rebase" for edit in old}, True))

    def solvable(self, overrides: Mapping[str, Any]) -> list[Edit]:
        """Return the active edits that can be solved again with these hyper-parameters.

        Where none takes these, but some could be solved again, the first of those: trying it
        raises the error that says why.
        """
        able = [(edit, self._methods.resolves(edit)) for edit in self._stack.entries]
        able = [(edit, names) for edit, names in able if names]
        fit = [edit for edit, names in able if set(overrides) <= names]
        return fit or [edit for edit, _ in able[:1]]

    def resolve(self, old: Sequence[Edit], overrides: Mapping[str, Any]) -> list[Edit]:
        """Take edits (in ledger order) off, and solve them again with other hyper-parameters."""
        calls = []
        for edit in old:
            config = self._methods.reconfigured(edit, overrides)
            self._methods.prepare(edit.method, config)
            calls.append(EditCall(edit.method, config, [list(edit.requests)], edit.id, edit))
        return self._carry_out(_Making(calls, old, {edit.id: "resolve" for edit in old}, True))

    def restored(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return the edits that these had superseded and that are off now, to be put back.

        Warns of what stays off because another active edit is about the same fact, and where
        nothing is left.
        """
        ids = {edit.id for edit in edits}
        others = Clashes([edit for edit in self._stack.entries if edit.id not in ids])
        off = [old for old in self._superseded_by(edits) if not self._ledger.is_active(old.id)]
        claimed = [old.id for old in off if others.about(old.requests, same_target=True)]
        if claimed:
            text = "Not put back: %s. Another active edit is about the same fact."
            logger.warning(text, first_few(claimed))
        elif not off:
            text = "Nothing was put back: %s superseded no edit that is off now."
            logger.warning(text, first_few([edit.id for edit in edits]))
        return [self._ledger.bound(old) for old in off if old.id not in claimed]

    # -- how -------------------------------------------------------------------------------------

    def _superseded_by(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return the records of the edits that these, or their earlier versions, superseded."""
        known = set(self._ledger.ids())
        read = functools.cache(self._ledger.get)
        found: dict[str, Edit] = {}
        for edit in edits:
            line = {edit.id: edit}
            while (before := edit.outcome.rebases) in known and before not in line:
                edit = line[before] = read(before)
            for each in line.values():
                # Older records name all that their call superseded, whatever it is about.
                there = [read(name) for name in each.outcome.supersedes if name in known]
                found |= {old.id: old for old in there if share_a_fact(old, each)}
        return list(found.values())

    def _making(self, call: EditCall, *, apply: bool, supersede: bool) -> _Making:
        requests = [request for batch in call.batches for request in batch]
        clashes = Clashes(self._stack.entries)
        old = clashes.about(requests, same_target=True) if supersede else []
        check_superseded(old, requests)
        return _Making([call], old, {edit.id: SUPERSEDED for edit in old}, apply)

    def _carry_out(self, making: _Making) -> list[Edit]:
        if making.apply:
            self._guards.prepare(self._model)
        making.touched += [edit.id for edit in making.old]
        with self._transactions.all_or_nothing(making.touched):
            self._transactions.take_off(making.old)
            # What erasures take away is what the user sees before any of these edits.
            making.calls = [
                replace(
                    call, batches=[naming_what_goes(self._model, part) for part in call.batches]
                )
                for call in making.calls
            ]
            asked = making.requests() if making.apply else []
            before = self._guards.before(self._model, asked)
            active = Clashes(self._stack.entries, self._model.parameters)
            with self._model.knowing(active.of_subject):
                for call in making.calls:
                    self._compute(call, making, active)
            new = making.new
            if making.apply:
                # Edits that no later one was computed on are folded here, all at once.
                missing = [edit for edit in new if edit.id not in self._stack.ids]
                self._transactions.put_on(missing)
                outcomes = self._guards.check_state(self._model, new, before)
                self._guards.check_finite(self._model, outcomes)
                new = [
                    edit.bind(edit.delta, outcome=outcome)
                    for edit, outcome in zip(new, outcomes, strict=True)
                ]
            return self._transactions.record(new, active=making.apply, replaced=making.replaced)

    def _compute(self, call: EditCall, making: _Making, active: Clashes) -> None:
        """Compute the edits of one call: add them to what is in the making and, applied, active.

        A method that works from the model's present state sees all of them on it.
        """
        new, replaced = making.new, making.replaced
        superseded = Clashes([edit for edit in making.old if replaced[edit.id] == SUPERSEDED])
        on_base = call.config.on_base
        text = f"Editing with {call.method}"
        with self._model.base_state() if on_base else nullcontext():
            for batch in self._model.progress.track(call.batches, text, len(call.batches)):
                if making.apply and not on_base:
                    there = set(self._stack.ids)
                    self._transactions.put_on([edit for edit in new if edit.id not in there])
                below = (None, ()) if on_base else computed_on(self._stack.entries)
                if call.solved is None:
                    computed = self._methods.compute(call.method, call.config, batch)
                else:
                    computed = self._methods.resolve(call.solved, call.config)
                making.apart = len(computed.deltas) == len(batch)
                groups = [[request] for request in batch] if making.apart else [list(batch)]
                for delta, group in zip(computed.deltas, groups, strict=True):
                    replaces = superseded.about(group, same_target=True)
                    outcome = Outcome(
                        peak_memory=computed.peak,
                        conflicts=active.conflicts(group),
                        overlaps=active.overlaps(group, delta),
                        warnings=active.moves(group, delta) if making.apply else (),
                        supersedes=tuple(edit.id for edit in replaces),
                        rebases=call.rebases,
                    )
                    edit = Edit(
                        sequence=self._ledger.next_sequence + len(new),
                        method=call.method,
                        delta_kind=delta.kind,
                        requests=tuple(group),
                        config=call.config.model_dump(mode="json"),
                        fingerprint=self._model.fingerprint_of(delta.parameters),
                        on_top_of=below[0],
                        parents=below[1],
                        versions=dict(plugins.library_versions(call.method)),
                        seconds=computed.seconds,
                        artifacts=self._artifacts(call.method, delta),
                        made_with=dict(delta.made_with),
                        outcome=outcome,
                    ).bind(delta)
                    making.touched.append(edit.id)
                    checked = self._guards.check_delta(self._model, edit)
                    self._guards.check_finite(self._model, [checked])
                    new.append(edit.bind(delta, outcome=checked))
                    if making.apply:
                        active.add(new[-1])

    def _artifacts(self, method: str, delta: Delta) -> dict[str, str]:
        """Return name → SHA-256 of what a delta needs besides its own data."""
        needed: dict[str, Any] = {}
        for key in delta.artifacts:
            name = self._model.artifacts.name(key)
            digest = self._model.artifacts.digest(name)
            if digest is None:
                raise PluginError(
                    f"Method {method!r} returned a delta that needs the artifact {key!r}, which is "
                    "not there: its `prepare` must have kept it."
                )
            needed[name] = digest
        return needed
