"""The model that methods and metrics see: module, tokenizer, anatomy, base and active edits."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from errata.common.floats import frobenius
from errata.common.progress import Progress
from errata.common.storage import canonical, parse_json
from errata.errors import AnatomyError, ConfigError, IntegrityError
from errata.model.access import Access
from errata.model.active_edits import ActiveEdits, NoEdits
from errata.model.artifacts import Artifacts
from errata.model.call import Call
from errata.model.pristine import Pristine
from errata.model.structure import hooked_by_others
from errata.model.task import WRITES_NOTHING, Task, require_task, task_of_module
from errata.model.tokens import tokenizer_for

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from errata.model.anatomy import Anatomy

logger = logging.getLogger("errata")
Kept = TypeVar("Kept")

# Entries of a configuration that differ between loads of one and the same model.
_VOLATILE = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures",
     "_attn_implementation_autoset", "attn_implementation", "use_cache"}
)  # fmt: skip

# Upper case, accents, digits, spaces and scripts: two tokenizers that agree here are taken as one.
_SAMPLE = (
    "The quick brown Fox, born in 1987, jumps over  the lazy dog's $3.50 café;\n\tÅngström wrote "
    "“Überraschung” (naïve?) to MARIE_CURIE@example.org: 東京, Москва, القاهرة, दिल्ली 🙂"
)


def _kept(computed: Any, key: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, metadata) as a file would give them back: copies, and plain JSON.

    Raises `TypeError` where it cannot be kept: in a hook, that is the plugin's mistake.
    """
    try:
        tensors, metadata = computed
        copied = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return copied, parse_json(canonical(dict(metadata)))
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(
            f"what was computed for {key[0]!r} cannot be kept: it must be tensors by name and "
            f"plain JSON ({error})"
        ) from error


def sample_tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of a text by which tokenizers are told apart, with and without specials."""
    return [
        tokenizer(_SAMPLE, add_special_tokens=special, verbose=False).input_ids
        for special in (True, False)
    ]


def _lasting(config: Any) -> Any:
    """Return a configuration without the volatile entries, its own or those of its parts'."""
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE}
    return config


def _compute_nothing(method: str, requests: Any, **config: Any) -> list[Any]:
    """Stand for `compute` where no editor has brought its methods."""
    del requests, config
    raise ConfigError(f"{method!r} cannot be computed: this model belongs to no editor.")


def _no_edits(subject: str) -> Sequence[Any]:
    """Stand for `edits_about` while no call of an editor runs."""
    del subject
    return ()


class Model:
    """A live transformer with everything an editing method needs to know about it.

    Attributes:
        module: the Hugging Face module, in eval mode. Plugins read it, hook it (and take the
            hooks off again), and never write to it.
        tokenizer: a copy of its tokenizer, a fast one, that reads prompts as its task wants them.
        anatomy: where the parts are (`errata.model.anatomy.Anatomy`).
        parameters: name → Parameter, resolved before anything was attached; tied weights once.
        pristine: the base tensors.
        stack: the edits that are active (`errata.edits.stack.Stack`).
        artifacts: cache directory for statistics and the like, keyed by fingerprint.
        progress: where long work reports to; `model.progress.track(iterable, "text")`.
        corpus: plain text paragraphs for statistics (None: the text that ships with errata).
        trust_remote_code: whoever opened it allowed code of strangers to run.
        opened_as: what opens it again: the name (or whole path) that was given, and the dtype
            (None: the checkpoint's). None for a module in memory.
        access: who may run it, and who changes it, at a time.
        call: what the running forward calls are about; every thread has its own.
        trained_on: digest of the training requests of the method whose hook is running; None for
            a method that is not trained.
        memory: what `remembered` keeps, by key; it lives as long as the model.
        compute: `compute(method, requests, **config)` returns another method's deltas as its
            `edit` would, with its presets; for methods that build on methods.
        edits_about: `edits_about(subject)` returns the edits about a subject that are active, also
            while they are taken off for a method that computes on the base, and those that the
            running call has made.
        bring: returns the folder of a model that plugins bring by name (the zoo's), fetched where
            it is not here; any other name as it is.
        branch: weight edits run beside the weights (y = W x + U Vᵀ x) instead of in them.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        anatomy: Anatomy,
        *,
        name: str = "model",
        checkpoint: Path | None = None,
        keep: str = "auto",
        artifacts: Artifacts | None = None,
        progress: Progress | Callable[[str], None] | None = None,
        corpus: Sequence[str] | None = None,
        branch: bool | None = None,
        trust_remote_code: bool = False,
        opened_as: tuple[str, str | None] | None = None,
    ) -> None:
        self.access = Access(module)
        self.module = module.eval()
        self.tokenizer = tokenizer_for(tokenizer, task_of_module(module))
        self.anatomy = anatomy
        self.name = name
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.buffers: dict[str, Tensor] = dict(module.named_buffers())
        self.pristine = Pristine({**self.parameters, **self.buffers}, checkpoint, keep)
        self.artifacts = artifacts or Artifacts()
        self.progress = Progress.of(progress)
        self.corpus = corpus
        self.trust_remote_code = trust_remote_code
        self.opened_as = opened_as
        self.call = Call()
        # Nothing can be folded into quantised weights.
        quantised = any(not p.is_floating_point() for p in self.parameters.values())
        self.branch = quantised if branch is None else branch
        self._of_base: dict[tuple[str, ...], Any] = {}
        self._hooked: tuple[list[str], str] = ([], "")
        self.trained_on: str | None = None
        self.memory: dict[object, Any] = {}
        self.compute: Callable[..., list[Any]] = _compute_nothing
        self.edits_about: Callable[[str], Sequence[Any]] = _no_edits
        self.bring: Callable[[str], str] = str
        self.stack: ActiveEdits = NoEdits()

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters.values())
        return f"Model({self.name!r}, {self.anatomy.model_type}, {count:,} parameters)"

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.module.config

    @cached_property
    def task(self) -> Task:
        """What it was made to do: "causal", "seq2seq", "masked" or "classify", by its class.

        Raises `ConfigError` for a class that does not say (a bare backbone).
        """
        return require_task(task_of_module(self.module), "This model", [type(self.module).__name__])

    @property
    def generates(self) -> bool:
        """Whether it can continue a text at all."""
        return self.task not in WRITES_NOTHING

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return self.parameters[self.anatomy.weight(self.anatomy.embedding_name)].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (of the first parameter)."""
        return next(iter(self.parameters.values())).dtype

    def parameter(self, name: str) -> nn.Parameter:
        """Return a parameter by name; raise `AnatomyError` when there is none."""
        if name not in self.parameters:
            raise AnatomyError(f"The model {self.name} has no parameter {name!r}.")
        return self.parameters[name]

    def weight_shape(self, name: str, transposed: bool) -> tuple[int, int]:
        """Return (d_out, d_in) of a weight, also where it is quantised and stored packed.

        Raises `IntegrityError` for what is no matrix.
        """
        shape = self.parameter(name).shape
        if self.parameters[name].is_floating_point():
            if len(shape) != 2:
                raise IntegrityError(
                    f"{name!r} has the shape {tuple(shape)} in {self.name}: it is no matrix."
                )
            rows, columns = shape
            return (int(columns), int(rows)) if transposed else (int(rows), int(columns))
        return self.anatomy.shape(self.module, name.removesuffix(".weight"))

    def weight_norm(self, name: str) -> float:
        """Return the Frobenius norm of a base weight."""
        base = self.pristine[name]
        if base.is_floating_point() or base.is_complex():
            return frobenius(base)
        path = name.removesuffix(".weight")
        return self.remembered(("weight norm", path), lambda: self._quantised_norm(path))

    @torch.no_grad()
    def _quantised_norm(self, path: str, chunk: int = 1024) -> float:
        """Return the norm of what a quantised module does to the unit vectors, bias left out."""
        module = self.module.get_submodule(path)
        _, d_in = self.anatomy.shape(self.module, path)
        total = 0.0
        with self.base_state():
            nothing = module(torch.zeros(1, d_in, device=self.device))
            for start in range(0, d_in, chunk):
                size = min(chunk, d_in - start)
                unit = torch.zeros(size, d_in, device=self.device)
                unit[torch.arange(size), start + torch.arange(size)] = 1.0
                total += float((module(unit) - nothing).double().square().sum())
        return math.sqrt(total)

    @property
    def prompt_ends(self) -> list[int] | None:
        """The column of the last prompt token per row, as `prompts` said it in this thread."""
        return self.call.prompt_ends

    @property
    def row_edits(self) -> list[frozenset[str]] | None:
        """The edits that each row takes, as `rows` said it in this thread; None: all."""
        return self.call.row_edits

    def active(self, kind: str) -> list[tuple[str, Any]]:
        """Return (edit id, delta) of the active edits of one delta kind, in ledger order."""
        return self.stack.of_kind(kind)

    @contextmanager
    def knowing(self, edits_about: Callable[[str], Sequence[Any]]) -> Iterator[None]:
        """Let methods ask for the edits about a subject during the block."""
        self.edits_about = edits_about
        try:
            yield
        finally:
            self.edits_about = _no_edits

    @contextmanager
    def base_state(self) -> Iterator[None]:
        """Take every edit off for the block, and put the same ones back after it."""
        with self.stack.temporarily([]):
            yield

    @contextmanager
    def prompts(self, ends: Sequence[int] | None) -> Iterator[None]:
        """Say where the prompt of each row ends for this thread's forward calls in the block.

        Whoever feeds prompt and continuation in one go (teacher forcing, decoding without a
        cache) must say it: a kind that decides at the prompt's last token cannot tell otherwise.

        Args:
            ends: column of the last prompt token per row, padding included, in the encoder for
                an encoder-decoder; None lets each call's last real token count again. A batch
                with k times as many rows (beams) takes each entry k times.
        """
        former = self.call.prompt_ends
        self.call.prompt_ends = None if ends is None else [int(end) for end in ends]
        try:
            yield
        finally:
            self.call.prompt_ends = former

    @contextmanager
    def rows(self, edits: Sequence[Collection[str]]) -> Iterator[None]:
        """Say which of the active edits each row takes, for this thread's forward calls.

        Args:
            edits: one collection of edit ids per row. A batch with k times as many rows (beams)
                takes each entry k times.

        Raises:
            CapabilityError: the edits are folded into the weights, or one acts by itself at run
                time (a codebook, an adapter): neither can differ from row to row.
            UnknownNameError: an id that is not active.
        """
        self.stack.check_rows({edit_id for row in edits for edit_id in row})
        former = self.call.row_edits
        self.call.row_edits = [frozenset(row) for row in edits]
        try:
            yield
        finally:
            self.call.row_edits = former

    def remembered(self, key: object, make: Callable[[], Kept]) -> Kept:
        """Return what was made under this key for the model; the first time, make it."""
        if key not in self.memory:
            self.memory[key] = make()
        found: Kept = self.memory[key]
        return found

    # -- what belongs to the base ----------------------------------------------------------------

    def of_base(
        self,
        *key: str,
        compute: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        sound: Callable[[Mapping[str, Tensor], Mapping[str, Any]], bool] | None = None,
        as_it_stands: bool = True,
        trained: bool = False,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return what is computed once per base: from memory, from the artifacts, or now.

        Args:
            *key: names what it is, and everything but the base that it depends on.
            compute: returns (tensors, plain JSON); called at most once per base, ever.
            sound: says whether what was stored is what it should be; else it is computed again.
            as_it_stands: `compute` runs the model as it stands. False where it takes the edits
                off itself, or reads other artifacts alone: then active edits do not matter.
            trained: it also depends on the training requests: each set of them has its own.

        Raises:
            ConfigError: it is not there yet, and edits are active: it belongs to the base.
            IntegrityError: it is not there yet, and other code changed the model.
        """
        if not all(isinstance(part, str) for part in key):
            raise TypeError(f"the key of what belongs to the base must be texts, not {key!r}")
        whole = self.base_key(*key, trained=trained)
        if whole not in self._of_base:
            stored = self.artifacts.load(whole)
            if stored is None or (sound is not None and not sound(*stored)):
                if as_it_stands and self.stack.ids:
                    raise ConfigError(
                        f"What is wanted ({key[0]}) belongs to the unedited model and was not "
                        f"computed yet, but edits are active ({', '.join(self.stack.ids[:3])}): "
                        "call `prepare` first, which takes them off meanwhile."
                    )
                self.stack.check_unchanged()  # it would be kept, and read in later processes
                stored = _kept(compute(), key)
                self.artifacts.save(whole, *stored)
            self._of_base[whole] = stored
        found: tuple[Mapping[str, Tensor], Mapping[str, Any]] = self._of_base[whole]
        return found

    def told_of_base(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return what was asked of `of_base` so far: its name and the JSON kept with it."""
        return [(key[0], about) for key, (_, about) in self._of_base.items()]

    def base_key(self, *key: str, trained: bool = False) -> tuple[str, ...]:
        """Return the artifact key under which `of_base` keeps something; deltas name it.

        Raises `ConfigError` for `trained` outside the hooks of a method that needs training.
        """
        whole = (key[0], self.fingerprint, *key[1:])
        if not trained:
            return whole
        if self.trained_on is None:
            raise ConfigError(
                f"{key[0]!r} is trained, but the method that asks for it does not say so: add "
                "`needs: [training]` to its registry file."
            )
        return (*whole, self.trained_on[:16])

    # -- identity --------------------------------------------------------------------------------

    @cached_property
    def config_digest(self) -> str:
        """SHA-256 of the configuration without the entries that vary between loads."""
        config = json.loads(self.config.to_json_string(use_diff=False))
        kept = _lasting(config)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration, every base tensor and what the tokenizer makes of a text.

        Artifacts are keyed by it: what is computed from texts depends on all three. While other
        code has hooks on the model it is one of its own: nothing tells such hooks apart.
        """
        if not (hooked := hooked_by_others(self.module, self.stack.hooks)):
            return self._own_fingerprint
        if hooked != self._hooked[0]:
            self._hooked = (hooked, uuid.uuid4().hex)
            text = "Other code has hooks on the model (%s): what is computed now is not used again."
            logger.warning(text, ", ".join(hooked[:3]))
        return hashlib.sha256(f"{self._own_fingerprint}:{self._hooked[1]}".encode()).hexdigest()

    @cached_property
    def _own_fingerprint(self) -> str:
        tokens = json.dumps(sample_tokens(self.tokenizer))
        whole = f"{self.config_digest}:{self.pristine.digest_all()}:{tokens}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def fingerprint_of(self, names: Sequence[str]) -> dict[str, str]:
        """Return the fingerprint that an edit of these parameters carries.

        Keys: "config" and each parameter's name; values: SHA-256 of the base's bytes. An edit
        without parameters carries the embedding's: the configuration does not tell models apart.
        """
        embedding = self.anatomy.weight(self.anatomy.embedding_name)
        covered = names or [name for name in (embedding,) if name in self.pristine]
        return {"config": self.config_digest, **{n: self.pristine.digest(n) for n in covered}}
