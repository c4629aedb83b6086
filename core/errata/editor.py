"""The façade: edit a model, see what is on it, take it out again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata.common.arguments import check_name, folder_of, names_file, path_of, texts_of
from errata.common.display import Described, ResultTable, plural
from errata.common.progress import Progress
from errata.contract.capabilities import check_prompts, warn_of_neighbours
from errata.contract.editing import EditCall, Editing
from errata.contract.guards import GuardPolicy, Guards
from errata.contract.manager import known_models
from errata.contract.methods import Methods
from errata.contract.preparation import Preparation
from errata.contract.registry import Registry
from errata.edits import formats
from errata.edits.autograd import recording
from errata.edits.cases import requests_of
from errata.edits.clashes import last_of_each
from errata.edits.delta_kinds import DeltaKinds
from errata.edits.edit import Edit, EditLike, EditsLike, LogEntry, each
from errata.edits.handover import leave, take_over
from errata.edits.ledger import Ledger
from errata.edits.rendering import rendered
from errata.edits.request import Request
from errata.edits.request_parsing import parse_arguments
from errata.edits.stack import Stack
from errata.edits.transaction import Transactions
from errata.errors import ConfigError, ErrataError, LedgerError, first_few
from errata.kit.auto_layers import resolve_auto_layers
from errata.model.access import claim, release
from errata.model.artifacts import Artifacts
from errata.model.generation import generate_with
from errata.model.loading import load_model, placement_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from errata.contract.config import MethodConfig
    from errata.contract.location import Location
    from errata.contract.measurement import Measurement
    from errata.contract.registry import Value
    from errata.model.model import Model


class Editor(Described):
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

    Attributes:
        model: the live model, its parts and its artifacts.
        ledger: the store of edits.
        registry: the merged catalogue.
        damaged: id → reason of active edits that could not be put on the model (a lost file, say).

    Args:
        model: a zoo name, a directory, a GGUF file, a hub name, or a module in memory.
        tokenizer: needed for a module (or `(module, tokenizer)`); else taken from the model's own.
        ledger: folder of a durable ledger; None keeps the ledger in memory. Edits that an
            existing ledger says are active are put on the model.
        device, dtype, device_map: where and in what precision the model is loaded.
        guards: a `GuardPolicy` or its fields, for example {"norm": "refuse"}.
        training: requests that methods which are trained learn from; never those to be edited.
        observers: plugin objects that see every hook call (and may add metrics).
        keep: where the pristine tensors are kept: "auto", "clone" or "checkpoint".
        corpus: paragraphs for second-moment statistics; None: the text that ships with errata.
        branch: run weight edits beside the weights, which stay untouched; None: where the weights
            are quantised.
        artifacts: cache folder; None: $ERRATA_CACHE or the platform's.
        registry: a merged registry; None reads shipped, plugin, user and project layers.
        progress: where long work reports to: `print`, say, or a `Progress`; None: the log, at INFO.
        trust_remote_code: run Python code that comes with the model or with a harness task. It
            can do whatever you can do: say True only for code that you have read.
    """

    @recording()
    def __init__(
        self,
        model: str | Path | nn.Module | tuple[nn.Module, PreTrainedTokenizerBase],
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        ledger: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        guards: GuardPolicy | Mapping[str, Any] | None = None,
        training: Sequence[Request] | None = None,
        observers: Sequence[object] = (),
        keep: str = "auto",
        corpus: Sequence[str] | None = None,
        branch: bool | None = None,
        artifacts: str | Path | None = None,
        registry: Registry | None = None,
        progress: Progress | Callable[[str], None] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.registry = Registry.load() if registry is None else registry
        if not isinstance(self.registry, Registry):
            raise ConfigError(f"registry: {registry!r} is none: give Registry.load() or nothing.")
        ledger = None if ledger is None else folder_of(ledger, "ledger")
        placement_of(dtype, device)  # before anything is fetched
        guarding = Guards(GuardPolicy.parse(guards))
        preparation = Preparation(training)
        name = str(model) if isinstance(model, (str, Path)) else ""
        known = known_models() if name else {}
        bring = known.get(name)
        take_over(model, ledger)
        self.model: Model = load_model(
            model if bring is None else bring(Progress.of(progress)),
            tokenizer,
            architectures=self.registry.architectures,
            known=known,
            device=device,
            dtype=dtype,
            device_map=device_map,
            keep=keep,
            corpus=corpus,
            branch=branch,
            artifacts=Artifacts(artifacts),
            progress=progress,
            trust_remote_code=trust_remote_code,
            **({} if bring is None else {"name": name}),
        )
        self._stack = Stack(self.model)
        self.model.stack = self._stack
        self._methods = Methods(
            self.model, self.registry, preparation, resolve_auto_layers, observers
        )
        self.ledger = Ledger.open(ledger, kinds=DeltaKinds())
        self._transactions = Transactions(
            self.model, self._stack, self.ledger, self._methods.observe
        )
        self.damaged = self._transactions.damaged
        self._editing = Editing(
            self.model, self._stack, self.ledger, self._methods, guarding, self._transactions
        )
        try:
            claim(self, self.model.parameters.values())
            self._transactions.reconcile()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "", repr(self.model)
        yield "", plural(len(self._stack.ids), "active edit")

    def close(self) -> None:
        """Close the ledger and let another editor have the model, which stays as it is.

        Modules that were in training mode when it was opened are in it again. An editor with the
        same ledger takes the edits over; to others they are part of the model.
        """
        leave(self._stack, self.ledger.path)
        self.model.access.put_back()
        self.ledger.close()
        release(self)

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
        commit: Literal["call", "batch"] = "call",
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
            supersede: take active edits about the same facts off, in the same step; `revert(edit,
                restore=True)` brings them back. Of a call's requests on one fact, the last is made.
            commit: "call": the call is one transaction, all of it or nothing; "batch": each
                batch is (100 requests where a method takes all at once and `batch_size` is None),
                so a long call that is killed keeps what it had made (an error's `done`).
            on_refused: "raise" stops where a guard refuses; "skip" goes on (each batch is a
                transaction then) without that request, or that batch where it is one edit.
            **fields: request fields (prompt, subject, target_new …) or hyper-parameters. One that
                is called like an argument or a request field must be given in `config`.

        Returns:
            One `Edit` for one request, a list of edits for a list.

        Raises:
            UnknownNameError: no such method. RequestError: a request that cannot be carried out.
            ConfigError: a bad hyper-parameter. CapabilityError: not for this method.
            EditRefused: a guard said no. LedgerError, StorageError: nothing was recorded.
            IntegrityError: other code changed the model, which an edit would overwrite.
        """
        single, asked, overrides = parse_arguments(request, config or {}, fields, supersede)
        requests = rendered(self.model, last_of_each(asked) if supersede else asked)
        check_name("commit", commit, ("call", "batch"))
        check_name("on_refused", on_refused, ("raise", "skip"))
        if supersede and not apply:
            raise ConfigError("supersede=True changes the model, apply=False does not: give one.")
        with self._changing("edit"):
            self._methods.entry(method)
            settings, _ = self.configure(method, overrides)
            batches = self._methods.batches(method, settings, requests, batch_size, commit, single)
            check_prompts(self.model, requests)
            warn_of_neighbours(method, self.registry, self.model)
            self._methods.prepare(method, settings)
            self._methods.check_overlap(method, settings, requests)
            call = EditCall(method, settings, batches)
            parts = [call] if commit == "call" and on_refused == "raise" else call.each()
            done = self._editing.make(
                parts, apply=apply, supersede=supersede, skip_refused=on_refused == "skip"
            )
        return done[0] if single and done else (None if single else ResultTable(done))

    def rebase(self, *edits: EditsLike) -> list[Edit]:
        """Compute active edits again on top of what is on the model now.

        Some edits depend on those that were active when they were computed (ROME in sequence,
        adapters). Once one of those is reverted, they are `stale`. Rebasing takes them off and
        computes them again, in their order, from the same requests and hyper-parameters; the old
        records stay in the ledger, reverted.

        By default all stale edits, and those made on top of them. Returns the new edits, in order;
        after any error the model and the ledger are as they were.
        """
        with self._changing("rebase"):
            wanted = self._active(edits) if edits else self._editing.stale()
            return self._editing.replay(wanted) if wanted else []

    def resolve(self, *edits: EditsLike, **config: Any) -> list[Edit]:
        """Solve active edits again with other hyper-parameters, from the values that they store.

        Joint edits (MEMIT's family) store keys and residuals; λ, the null space and C (`tokens` of
        text) decide how they are written. So λ can follow a stream's length, and C be of more text
        than at first. By default every edit that can be solved again. Raises
        `CapabilityError` where a method cannot, `ConfigError` for values that decide residuals.
        """
        with self._changing("resolve"):
            wanted = self._active(edits) if edits else self._editing.solvable(config)
            return self._editing.resolve(wanted, config) if wanted else []

    def configure(
        self, method: str, overrides: Mapping[str, Any] | None = None
    ) -> tuple[MethodConfig, list[Value]]:
        """Return a method's configuration for this model, layers as numbers, and its sources."""
        return self._methods.configure(method, overrides)

    def prepare(self, method: str, config: Mapping[str, Any] | None = None) -> None:
        """Compute what a method needs of the base (statistics, training) before its first edit.

        `edit` does the same when it has to; call this first to spend the time beforehand.
        """
        with self._changing("prepare"):
            self._methods.prepare(method, self.configure(method, config)[0])

    # -- what is on the model --------------------------------------------------------------------

    def log(self) -> ResultTable[LogEntry]:
        """Return every edit of the ledger in order, and whether it is on the model now."""
        active, stale = set(self._stack.ids), set(self.ledger.stale_ids())
        return ResultTable(LogEntry.of(edit, active, stale) for edit in self.ledger.edits())

    def revert(self, *edits: EditsLike, restore: bool = False) -> list[Edit]:
        """Take edits off the model, in any order; the others stay exactly as they are.

        Args:
            *edits: which: records, ids, or lists of them.
            restore: put back on what these edits had superseded; not where another active edit
                is about the same fact.

        Raises `UnknownNameError` for an id that is not in the ledger and `LedgerError` for one that
        is not active.
        """
        with self._changing("revert"):
            wanted = [self._record(edit) for edit in each(edits)]
            if not wanted:
                raise LedgerError("Say which edit to revert: revert(edit) or revert('id').")
            self._require(wanted, self.ledger.active_ids())
            back = self._editing.restored(wanted) if restore else []
            self._transactions.exchange(wanted, back)
        return wanted

    def apply(self, *targets: EditsLike | Path) -> list[Edit]:
        """Put recorded edits, or exported files' edits that are off, on the model; return them.

        All of them as one change. A file's edits are taken into the ledger; those that are on stay
        on, damaged ones are repaired. Raises `LedgerError` for the id of an active edit.
        """
        with self._changing("apply"):
            files, edits = list[Path](), list[Edit]()
            for one in each(targets):
                if isinstance(one, Path) or (isinstance(one, str) and names_file(one)):
                    files.append(path_of(one, "path"))
                else:
                    edits.append(self._get(one))
            self._require(edits, self._stack.ids, active=False)
            return self._transactions.apply(edits, files)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Take every edit off for a block of code."""
        with self._stack.temporarily([]):
            yield

    @contextmanager
    def only(self, *edits: EditsLike) -> Iterator[None]:
        """Have exactly these edits on the model for a block of code."""
        on = {edit.id: edit for edit in self._stack.entries}
        records = [self._record(edit) for edit in each(edits)]
        with self._stack.temporarily([on.get(r.id) or self.ledger.bound(r) for r in records]):
            yield

    def verify(self) -> list[str]:
        """Return every discrepancy: tensors that are not bit for bit base + fold, ledger damage.

        An empty list means that the model is exactly what the log says.
        """
        with self._stack.changing():
            problems = self._stack.problems()
            for name, why in self.damaged.items():
                problems.append(f"edit {name} is not on the model (reverting it retires it): {why}")
            there = [name for name in self.ledger.active_ids() if name not in self.damaged]
            if not self._stack.suspended and self._stack.ids != there:
                problems.append("the active edits differ from the ledger's")
            found, said = self.ledger.verify(), self.damaged.values()
            return problems + [problem for problem in found if not any(w in problem for w in said)]

    def refresh(self) -> None:
        """Take over what another process wrote to the same ledger."""
        with self._changing("refresh"):
            self.ledger.refresh()
            self._transactions.reconcile()

    # -- looking and measuring -------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """Continue one prompt (gives text) or several (a list); greedy unless told otherwise.

        Options, as in `errata.model.generation.generate`: `max_new_tokens`, `stop`, `do_sample`,
        `temperature`, `top_k`, `top_p`, `seed`, `batch_size` and `chat`. With `details=True` each
        is an `errata.model.answers.Generated`: text, tokens, and the trace of what answered.
        """
        texts = generate_with(self.model, texts_of(prompt, "prompt"), options)
        return texts[0] if isinstance(prompt, str) else texts

    def evaluate(
        self,
        requests: Request | Edit | Iterable[Request | Edit] | None = None,
        protocols: str | Sequence[str] = ("counterfact", "generation"),
        **settings: Any,
    ) -> ResultTable[Measurement]:
        """Measure the model as it stands; by default on the requests of the active edits.

        A protocol for which they have nothing gives no number, and a warning that says what they
        lack.

        Args:
            requests: requests or edits; those of different edits are different cases.
            protocols: how to measure, one name or several.
            **settings: `baseline`, the base's answers if known (`errata.evaluate.Baseline`),
                or fields of `errata.evaluate.MeasureSettings`.
        """
        manager = self._methods.measuring()
        names = texts_of(protocols, "protocols")
        manager.check_protocols(names)
        with self._stack.changing():  # the base is measured with every edit off
            given = requests_of(self._stack.entries if requests is None else requests)
            wanted = rendered(self.model, given)
            found = manager.evaluate(self.model, wanted, tuple(names), settings)
            return ResultTable(found)

    def locate(
        self, request: Request | Mapping[str, Any], method: str = "", **config: Any
    ) -> Location:
        """Say where the model keeps what a request would change.

        By causal tracing, or by `method` when it brings a locator of its own.
        """
        (wanted,) = rendered(self.model, [Request.parse(request)])
        settings = self.configure(method, config)[0] if method else (config or None)
        with self._stack.changing():  # traces change what passes through the model
            found = self._methods.locating(method).locate(self.model, wanted, settings)
        if found is None:
            raise ErrataError("No locator knows this request; try another `by` or method.")
        return found

    # -- moving edits ----------------------------------------------------------------------------

    def export(
        self,
        path: str | Path,
        *edits: EditsLike,
        format: str = "errata",
        overwrite: bool = False,
        **options: Any,
    ) -> Path:
        """Write edits (by default the active ones) as one file, or as a LoRA adapter.

        Args:
            path: the file ("errata", "gguf") or directory ("peft") to write.
            *edits: which edits.
            format: "errata" for `apply` and `import_`; "peft" for PeftModel; "gguf" for llama.cpp.
            overwrite: replace an earlier export of errata; nothing else ever is.
            **options: of "peft" and "gguf": `rank`, `error`; of "gguf": `base`, its GGUF file.
        """
        write = formats.writer(formats.EXPORTS, format, options)
        target = path_of(path, "path")
        with self._stack.changing():
            chosen = [self._get(edit) for edit in (each(edits) if edits else self._stack.ids)]
            if not chosen:
                bad = "".join(f" {name} is damaged: {why}" for name, why in self.damaged.items())
                raise LedgerError(f"There is nothing to export: no edit is active; name one.{bad}")
            if format == formats.OWN:
                ids, artifacts = [edit.id for edit in chosen], self.model.artifacts
                return self.ledger.export(ids, target, artifacts, overwrite=overwrite)
            return write(self.model, chosen, target, overwrite, **options)

    def import_(self, path: str | Path) -> list[Edit]:
        """Take the edits of an exported file into the ledger, inactive.

        Damaged active edits that the file repairs are put on the model.
        Raises `FingerprintError` for another model's edits, `IntegrityError` for a damaged file.
        """
        with self._changing("import"):
            records = self._transactions.import_(path_of(path, "path"))
            if self.damaged:
                self._transactions.reconcile()
            return records

    def merge(
        self, path: str | Path, overwrite: bool = False, format: str = "checkpoint", **options: Any
    ) -> Path:
        """Write the edited model as a plain Hugging Face checkpoint, or as one GGUF file.

        Options of "gguf": `base`, the base's GGUF file, and `type` ("f16", "q4_1" …).
        """
        write = formats.writer(formats.MERGES, format, options)
        with self._stack.changing():
            return write(self.model, path_of(path, "path"), overwrite, **options)

    # -- inside ----------------------------------------------------------------------------------

    def _record(self, edit: EditLike) -> Edit:
        """Return the record of an edit of this ledger, by record, id or unique prefix."""
        return self.ledger.get(edit.id if isinstance(edit, Edit) else edit)

    def _get(self, edit: EditLike) -> Edit:
        """Return an edit of this ledger with its delta."""
        return self.ledger.bound(self._record(edit))

    def _active(self, edits: Sequence[EditsLike]) -> list[Edit]:
        """Return these edits in ledger order; raise `LedgerError` unless they are active."""
        wanted = sorted((self._get(e) for e in each(edits)), key=lambda edit: edit.sequence)
        self._require(wanted, self._stack.ids)
        return wanted

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        with self._stack.changing():
            self._stack.check_free(what)
            yield

    def _require(self, edits: Sequence[Edit], on: Collection[str], *, active: bool = True) -> None:
        """Raise `LedgerError` for edits that are not `on`; unless `active`, for those that are."""
        on_it = set(on)
        if wrong := [edit.id for edit in edits if (edit.id in on_it) is not active]:
            with self.ledger.transaction():  # raises where another process changed the ledger
                state, there = "not" if active else "already", first_few(self._stack.ids) or "none"
                raise LedgerError(f"{first_few(wrong)}: {state} active. Active now: {there}.")
