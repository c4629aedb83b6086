"""The façade: edit a model, see what is on it, take it out again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from errata.contract import plugins
from errata.contract.capabilities import check_capabilities, check_fingerprint, check_prompts
from errata.contract.methods import Methods
from errata.contract.registry import Registry, Value
from errata.contract.rules import GuardPolicy, Guards
from errata.edits import export
from errata.edits.edit import Edit, requests_of
from errata.edits.ledger import Ledger
from errata.edits.request import Request, parse_arguments
from errata.edits.stack import Entry
from errata.edits.transaction import Task, Transactions
from errata.errors import ConfigError, EditRefused, ErrataError, LedgerError, UnknownNameError
from errata.kit.auto_layers import resolve_auto_layers
from errata.model import generation
from errata.model.artifacts import Artifacts
from errata.model.loading import load_model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from errata.contract.config import MethodConfig
    from errata.edits.delta import Delta
    from errata.evaluate import Baseline, Measurement
    from errata.locate import Location
    from errata.model.model import Model
    from errata.model.progress import Progress

logger = logging.getLogger("errata")
EditLike = Edit | str


class LogEntry(NamedTuple):
    """One line of the log.

    Attributes:
        edit: the edit.
        active: it is on the model.
        conflicts: ids of edits that say something else about the same fact.
        overlaps: ids of edits whose keys hardly differ from its own.
        stale: it is active, but was computed on top of an edit that is not (`Editor.rebase`).
    """

    edit: Edit
    active: bool
    conflicts: tuple[str, ...]
    overlaps: tuple[str, ...] = ()
    stale: bool = False


class Editor:
    """A model, its ledger and the methods that edit it.

    >>> from errata.datasets import atlas
    >>> editor = Editor("atlas-gpt2")
    >>> fact = atlas.requests()[0]
    >>> before = editor.generate(fact.text)
    >>> edit = editor.edit(fact, method="rome")
    >>> fact.target_new in editor.generate(fact.text)
    True
    >>> _ = editor.revert(edit)
    >>> editor.generate(fact.text) == before
    True

    Args:
        model: a zoo name, a directory, a hub name, or a transformers module in memory.
        tokenizer: needed for a module in memory; else taken from beside the model.
        ledger: folder of a durable ledger; None keeps the ledger in memory. Edits that an
            existing ledger says are active are put on the model.
        device, dtype, device_map: where and in what precision the model is loaded.
        guards: a `GuardPolicy` or its fields, for example {"norm": "refuse"}.
        observers: plugin objects that see every hook call (and may add metrics).
        keep: where the pristine tensors are kept: "auto", "clone" or "checkpoint".
        corpus: paragraphs for second-moment statistics; None: the text that ships with errata.
        branch: run weight edits beside the weights, which stay untouched; None: where the weights
            are quantised.
        artifacts: cache folder; None: $ERRATA_CACHE or the platform's.
        registry: a merged registry; None reads shipped, plugin, user and project layers.
        progress: where long work reports to.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        ledger: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        guards: GuardPolicy | Mapping[str, Any] | None = None,
        observers: Sequence[object] = (),
        keep: str = "auto",
        corpus: Sequence[str] | None = None,
        branch: bool | None = None,
        artifacts: str | Path | None = None,
        registry: Registry | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.registry = registry or Registry.load(plugin_files=plugins.registry_files())
        self._guards = Guards(GuardPolicy.parse(guards))
        self._methods = Methods(
            self._guards, observers, active=lambda: [e.edit for e in self.log() if e.active]
        )
        self._suspended = 0
        self.model: Model = load_model(
            model,
            tokenizer,
            architectures=self.registry.architectures,
            device=device,
            dtype=dtype,
            device_map=device_map,
            keep=keep,
            corpus=corpus,
            branch=branch,
            artifacts=Artifacts(artifacts),
            progress=progress,
        )
        self._kinds: dict[str, type[Delta]] = dict(self._methods.manager("").delta_kinds())
        self.ledger = Ledger.open(ledger, kinds=self._kinds)
        self._transactions = Transactions(
            self.model, self.ledger, self._methods, self._guards, self._kinds
        )
        try:
            self._reconcile()
        except BaseException:
            self.ledger.close()
            raise

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Editor({self.model!r}, {len(self.model.stack.ids)} active edits)"

    def close(self) -> None:
        """Close the ledger. The model stays as it is."""
        self.ledger.close()

    # -- editing ---------------------------------------------------------------------------------

    def edit(
        self,
        request: Request | Mapping[str, Any] | str | Iterable[Request | Mapping[str, Any]] = "",
        *,
        method: str,
        config: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        apply: bool = True,
        supersede: bool = False,
        on_refused: Literal["raise", "skip"] = "raise",
        **fields: Any,
    ) -> Any:
        """Compute edits, check them, put them on the model and record them.

        Args:
            request: a request, a mapping of its fields, a prompt (then with keywords), or a list.
            method: name of an installed method.
            config: hyper-parameters; they may also be given as keywords.
            batch_size: how many requests the method gets at once; by default what it declares.
            apply: False computes and records the edits without putting them on the model.
            supersede: take active edits about the same facts (subject and relation) off, as one
                with putting the new ones on; `revert(edit, restore=True)` brings them back.
            on_refused: "raise" stops at the first edit that a guard refuses (`done` on the
                error holds the edits made before it); "skip" goes on with the next batch.
            **fields: request fields (prompt, subject, target_new …) or hyper-parameters.

        Returns:
            One `Edit` for one request, a list of edits for a list.

        Raises:
            UnknownNameError: no such method. RequestError: a request that cannot be carried out.
            ConfigError: a bad hyper-parameter. CapabilityError: not for this method.
            EditRefused: a guard said no. LedgerError, StorageError: nothing was recorded.
            After any error the model and the ledger are as they were.
        """
        single, requests, overrides = parse_arguments(request, config or {}, fields)
        self._not_suspended("edit")
        if supersede and not apply:
            raise ConfigError("supersede=True takes edits off the model, apply=False leaves it.")
        entry = self.registry.method(method) if method in self.registry.methods else None
        self._methods.manager(method)  # raises, with a suggestion, for a misspelt name
        if entry is None:
            raise ErrataError(
                f"The method {method!r} is installed but no registry file describes it: ship a "
                f"registry.yaml with the stanza methods.{method} beside its package."
            )
        settings, _ = self.configure(method, overrides)
        check_capabilities(method, entry, requests, self.model, batch_size)
        check_prompts(self.model, requests)
        self._transactions.prepare(method, settings)
        size = batch_size or entry.capabilities.default_batch or len(requests)
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        done: list[Edit] = []
        for batch in self.model.progress.track(batches, f"Editing with {method}", len(batches)):
            task = Task(method, settings, batch)
            try:
                done += self._transactions.make(task, apply=apply, supersede=supersede)
            except EditRefused as error:
                self.ledger.refuse(
                    method=method,
                    requests=batch,
                    config=settings.model_dump(mode="json"),
                    reason=error.reason,
                    measured=error.measured,
                )
                error.done = list(done)  # type: ignore[attr-defined]
                if on_refused == "raise":
                    raise
                logger.warning("%s", error)
            except ErrataError as error:
                error.done = list(done)  # type: ignore[attr-defined]
                raise
        return done[0] if single and done else (None if single else done)

    def rebase(self, *edits: EditLike) -> list[Edit]:
        """Compute active edits again on top of what is on the model now.

        For edits whose effect depends on those that were active when they were computed (ROME in
        sequence, adapters): after one of these was reverted they are `stale`. They are taken off
        and computed again, in their order, from the same requests and hyper-parameters; the old
        records stay in the ledger, reverted.

        Args:
            *edits: which; by default all that are stale, and those made on top of them.

        Returns:
            The new edits, in order. After any error the model and the ledger are as they were.
        """
        self._not_suspended("rebase")
        firm = set(self.model.stack.ids)
        if edits:
            wanted = sorted((self._get(edit) for edit in edits), key=lambda edit: edit.sequence)
            self._require({edit.id for edit in wanted} <= firm, wanted, "not active")
        else:
            wanted = []
            for entry in self.log():
                if entry.edit.is_stale(firm):
                    wanted.append(self._get(entry.edit))
                    firm.discard(entry.edit.id)  # what was made on top of it comes with it
        return self._transactions.replay(wanted) if wanted else []

    def configure(
        self, method: str, overrides: Mapping[str, Any] | None = None
    ) -> tuple[MethodConfig, list[Value]]:
        """Return a method's configuration for this model and where each value comes from.

        Layers that are "auto" come out as those of the method's cached sweep of this model.
        """
        anatomy = self.model.anatomy
        facts = {
            "model_type": anatomy.model_type,
            "n_layers": anatomy.n_layers,
            "hidden_size": anatomy.hidden_size,
            "name": self.model.name,
        }
        config = self._methods.plugin(method).config
        resolved, values = self.registry.resolve(method, config, facts, overrides)
        named, why = resolve_auto_layers(self.model, method, resolved)
        return named, [
            value if value.value == getattr(named, value.name)
            else replace(value, value=getattr(named, value.name), source=why)
            for value in values
        ]  # fmt: skip

    def prepare(self, method: str, config: Mapping[str, Any] | None = None) -> None:
        """Compute what a method needs of the base (statistics, training) before its first edit.

        `edit` does so by itself when it has to; this moves the time it takes.
        """
        self._transactions.prepare(method, self.configure(method, config)[0])

    # -- what is on the model --------------------------------------------------------------------

    def log(self) -> list[LogEntry]:
        """Return every edit of the ledger in order, and whether it is on the model now."""
        active = set(self.model.stack.ids)
        return [
            LogEntry(
                edit,
                edit.id in active,
                tuple(edit.outcome.get("conflicts", ())),
                tuple(edit.outcome.get("overlaps", ())),
                edit.is_stale(active),
            )
            for edit in self.ledger.edits()
        ]

    def revert(self, *edits: EditLike, restore: bool = False) -> list[Edit]:
        """Take edits off the model, in any order; the others stay exactly as they are.

        Args:
            *edits: which.
            restore: put back on what these edits had superseded.

        Raises `UnknownNameError` for an id that is not in the ledger and `LedgerError` for an
        edit that is not active.
        """
        self._not_suspended("revert")
        wanted = [self._get(edit) for edit in edits]
        if not wanted:
            raise LedgerError("Say which edit to revert: revert(edit) or revert('id').")
        active = set(self.model.stack.ids)
        self._require({e.id for e in wanted} <= active, wanted, "not active")
        known = set(self.ledger.ids()) - active if restore else set()
        names = [name for edit in wanted for name in edit.outcome.get("supersedes", ())]
        back = [self._get(name) for name in dict.fromkeys(names) if name in known]
        self._transactions.exchange(wanted, back)
        return wanted

    def apply(self, target: EditLike | Path) -> list[Edit]:
        """Put a recorded edit, or every edit of an exported file, (back) on the model."""
        self._not_suspended("apply")
        if isinstance(target, Path) or (isinstance(target, str) and Path(target).is_file()):
            wanted = [self._get(edit.id) for edit in self.import_(target)]
        else:
            wanted = [self._get(target)]
        active = set(self.model.stack.ids)
        self._require(not {e.id for e in wanted} & active, wanted, "already active")
        self._transactions.exchange([], wanted)
        return wanted

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Take every edit off for a block of code."""
        with self._with_entries([]):
            yield

    @contextmanager
    def only(self, *edits: EditLike) -> Iterator[None]:
        """Have exactly these edits on the model for a block of code."""
        wanted = [self._get(edit) for edit in edits]
        with self._with_entries([Entry(e.sequence, e.id, e.delta) for e in wanted]):
            yield

    def verify(self) -> list[str]:
        """Return every discrepancy: tensors that are not bit for bit base + fold, ledger damage.

        An empty list means that the model is exactly what the log says.
        """
        problems = [
            f"tensor {name} is not what the stack says" for name in self.model.stack.differing()
        ]
        if not self._suspended and self.model.stack.ids != self.ledger.active_ids():
            problems.append("the active edits differ from the ledger's")
        return problems + self.ledger.verify()

    def refresh(self) -> None:
        """Take over what another process wrote to the same ledger."""
        self.ledger.refresh()
        self._reconcile()

    # -- looking and measuring -------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """Continue one prompt (returns text) or several (returns a list); greedy by default."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = generation.generate(self.model, prompts, **options)
        return texts[0] if isinstance(prompt, str) else texts

    def evaluate(
        self,
        requests: Request | Edit | Iterable[Request | Edit] | None = None,
        protocols: Sequence[str] = ("counterfact", "generation"),
        *,
        baseline: Baseline | None = None,
        **settings: Any,
    ) -> list[Measurement]:
        """Measure the model as it stands; by default on the requests of the active edits.

        Args:
            requests: requests or edits.
            protocols: how to measure.
            baseline: what the base answers, if known.
            **settings: fields of `errata.evaluate.MeasureSettings`, without a baseline.
        """
        if requests is None:
            requests = [entry.edit for entry in self.log() if entry.active]
        manager = self._methods.measuring(baseline, **settings)
        known = manager.protocols()
        for name in protocols:
            if name not in known:
                raise UnknownNameError("protocol", name, known)
        return manager.evaluate(self.model, requests_of(requests), tuple(protocols))

    def locate(
        self, request: Request | Mapping[str, Any], method: str = "", **config: Any
    ) -> Location:
        """Say where the model keeps what a request would change.

        By causal tracing, or by `method` when it brings a locator of its own.
        """
        wanted = Request.parse(request)
        settings = self.configure(method, config)[0] if method else (config or None)
        found = self._methods.manager(method).locate(self.model, wanted, settings)
        if found is None:
            raise ErrataError("No plugin could locate this request.")
        return found

    # -- moving edits ----------------------------------------------------------------------------

    def export(
        self,
        path: str | Path,
        *edits: EditLike,
        format: str = "errata",
        overwrite: bool = False,
        **options: Any,
    ) -> Path:
        """Write edits (by default the active ones) as one file, or as a PEFT LoRA adapter.

        Args:
            path: the file ("errata") or directory ("peft") to write.
            *edits: which edits.
            format: "errata" for `apply` and `import_` anywhere; "peft" for plain PeftModel.
            overwrite: replace what is there.
            **options: of "peft": `rank` and `error`, see `errata.edits.export.export_peft`.
        """
        export.check_format(format, options)
        chosen = [self._get(edit) for edit in edits or self.model.stack.ids]
        if not chosen:
            raise LedgerError("There is nothing to export: no edit is active and none was named.")
        if format == "errata":
            return self.ledger.export([e.id for e in chosen], Path(path), overwrite=overwrite)
        return export.export_peft(self.model, chosen, Path(path), overwrite, **options)

    def import_(self, path: str | Path) -> list[Edit]:
        """Take the edits of an exported file into the ledger, inactive.

        Raises `FingerprintError` when they were made for another model and `IntegrityError` when
        the file is damaged; nothing is taken over then.
        """
        for edit, delta in self.ledger.read_export(Path(path)):
            check_fingerprint(self.model, edit)
            delta.check(self.model)
        return self.ledger.import_(Path(path))

    def merge(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the edited model as a plain Hugging Face checkpoint, tokenizer included."""
        return export.merge_checkpoint(self.model, Path(path), overwrite)

    # -- inside ----------------------------------------------------------------------------------

    def _get(self, edit: EditLike) -> Edit:
        """Return an edit of this ledger with its delta, by record, id or unique prefix."""
        found = self.ledger.get(edit.id if isinstance(edit, Edit) else edit)
        if found.delta_kind not in self._kinds:
            self._kinds.update(self._methods.manager(found.method).delta_kinds())
        return found.bind(self.ledger.delta(found.id))

    def _reconcile(self) -> None:
        """Make the model what the ledger says."""
        live = {entry.edit_id: entry for entry in self.model.stack.entries}
        entries: list[Entry] = []
        for edit_id in self.ledger.active_ids():
            if edit_id in live:
                entries.append(live[edit_id])
                continue
            edit = self._get(edit_id)
            check_fingerprint(self.model, edit)
            edit.delta.check(self.model)
            entries.append(Entry(edit.sequence, edit.id, edit.delta))
        self.model.stack.set(entries)

    @contextmanager
    def _with_entries(self, entries: list[Entry]) -> Iterator[None]:
        with self.model.stack.temporarily(entries):
            self._suspended += 1
            try:
                yield
            finally:
                self._suspended -= 1

    def _not_suspended(self, what: str) -> None:
        if self._suspended:
            raise LedgerError(
                f"Cannot {what} inside disabled() or only(): leave the block first, so that "
                "what is recorded is what is on the model."
            )

    def _require(self, condition: bool, edits: Sequence[Edit], what: str) -> None:
        if not condition:
            names = ", ".join(edit.id for edit in edits)
            raise LedgerError(
                f"{names}: {what}. Active now: {', '.join(self.model.stack.ids) or 'none'}."
            )
