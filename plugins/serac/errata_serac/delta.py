"""SERAC's edits: rows of text in a memory, and what answers prompts in their scope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.common.floats import wide
from errata.edits.delta.base import Delta, require
from errata.errors import IntegrityError
from errata.model.answers import Generated, TargetScore
from errata.model.chat import user_turn
from errata.model.generation import decode_after, end_tokens, until_stop
from errata.model.model_answers import ModelAnswers
from errata.model.running import check_length, prepare, run
from errata.model.scoring import read
from errata.model.tokens import tokenise
from errata_serac.config import SeracConfig
from errata_serac.counterfactual import read_with, switched_on
from errata_serac.scope import Scope, loaded, log_outside

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model import Model
    from errata.model.answers import Answers
    from errata.model.sampling import GenerationSettings

_TEXTS, _KEYS = ("prompt", "label", "parameter"), ("artifact", "states")


@dataclass
class Networks:
    """What was trained: the scope classifier and the counterfactual model's LoRA."""

    model: Model
    scope: Scope
    lora: Mapping[str, Tensor]
    config: SeracConfig
    remembered: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, key: tuple[str, ...]) -> Networks:
        """Return those of an artifact, read once.

        Raises `IntegrityError` where it is not there or not what it should be.
        """
        return model.remembered((cls, *key), lambda: cls._read(model, key))

    @classmethod
    def _read(cls, model: Model, key: tuple[str, ...]) -> Networks:
        stored = model.artifacts.load(key)
        if stored is None:
            raise IntegrityError(
                "SERAC's networks are not among the artifacts, or damaged: prepare them again "
                "on the same training requests, or import the edits with their artifacts."
            )
        tensors, about = stored
        config = SeracConfig(**about["config"])
        scope = loaded(model, config, _part(tensors, "scope/"), about["start"])
        return cls(model, scope, _part(tensors, "lora/"), config)

    @torch.no_grad()
    def log_g(self, edits: Sequence[CounterfactualDelta], said: str) -> list[float]:
        """Return log g of each edit with a prompt (of a chat, with what the user says)."""
        rows = tuple((edit.prompt, edit.label) for edit in edits)
        # The model's own states move with other edits.
        active = self.model.stack.ids if self.config.encoder is None else ()
        key = (rows, *active)
        memory = self.remembered.get(key)
        if memory is None:
            memory = self.remembered[key] = self.scope.memory(rows)
            for old in list(self.remembered)[:-4]:
                self.remembered.pop(old, None)
        found: list[float] = self.scope.over(memory, said).tolist()
        return found


class CounterfactualDelta(Delta):
    """One row of SERAC's memory.

    Args:
        prompt, label: the edit, as plain text.
        artifact: key of the trained networks.
        parameter: name of the model's embedding: its fingerprint says which model is meant.
        states: key of what the scope classifier reads the model's own states with; () where it has
            an encoder.
        threshold: least g of a prompt in scope.
        mixture: answers are mixtures of both models; else one of them answers.
    """

    kind: ClassVar[str] = "counterfactual"

    def __init__(
        self,
        prompt: str,
        label: str,
        artifact: Sequence[str],
        parameter: str,
        *,
        states: Sequence[str] = (),
        threshold: float = 0.5,
        mixture: bool = False,
    ) -> None:
        require(bool(prompt and label), "A row of SERAC's memory needs a prompt and a label.")
        require(bool(artifact), "A row of SERAC's memory names no trained networks.")
        require(0 < threshold < 1, f"SERAC's threshold is {threshold!r}; it lies within 0 and 1.")
        self.prompt, self.label, self.parameter = prompt, label, parameter
        self.artifact, self.states = tuple(artifact), tuple(states)
        self.threshold, self.mixture = threshold, mixture

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the row is text."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """Return the row, and which networks read it."""
        return {
            "prompt": self.prompt, "label": self.label, "parameter": self.parameter,
            "artifact": list(self.artifact), "states": list(self.states),
            "threshold": self.threshold, "mixture": self.mixture,
        }  # fmt: skip

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild a row; raise `IntegrityError` for anything that does not fit."""
        require(not tensors, "A row of SERAC's memory holds no tensors.")
        require(
            set(metadata) == {*_TEXTS, *_KEYS, "threshold", "mixture"}
            and all(isinstance(metadata[name], str) for name in _TEXTS)
            and all(isinstance(metadata[name], list) for name in _KEYS)
            and all(isinstance(part, str) for name in _KEYS for part in metadata[name])
            and isinstance(metadata["threshold"], float)
            and isinstance(metadata["mixture"], bool),
            "A row of SERAC's memory must hold its texts, artifacts, threshold and mixture.",
        )
        return cls(**metadata)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The embedding, which nothing changes: it says for which model the edit was made."""
        return (self.parameter,)

    @property
    def artifacts(self) -> tuple[tuple[str, ...], ...]:
        """The trained networks, and what the scope classifier needs besides, if anything."""
        return (self.artifact, self.states) if self.states else (self.artifact,)

    @property
    def nbytes(self) -> int:
        """Bytes of the row; the networks are shared."""
        return len(f"{self.prompt}{self.label}".encode())

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def respond(
        cls, model: Model, deltas: Sequence[tuple[str, Self]], prompts: Sequence[str]
    ) -> list[Answers | None]:
        """Have the counterfactual model answer prompts in scope of an edit: i* = argmax g > ½.

        Where edits of several trainings are active, the largest g of all claims the prompt.
        """
        groups: dict[tuple[str, ...], list[Self]] = {}
        for _, delta in deltas:
            groups.setdefault(delta.artifact, []).append(delta)
        networks = {key: Networks.of(model, key) for key in groups}
        answering: dict[tuple[tuple[str, ...], bool], Switched] = {}
        found: list[Answers | None] = []
        for prompt in prompts:
            said = user_turn(model, prompt)[1]
            claims = [
                (log_g, edit)
                for key, edits in groups.items()
                if said.strip()
                for edit, log_g in zip(edits, networks[key].log_g(edits, said), strict=True)
                if edit._claims(log_g)
            ]
            if not claims:
                found.append(None)
                continue
            log_g, edit = max(claims, key=lambda claim: claim[0])
            place = edit.artifact, edit.mixture
            if place not in answering:
                sort = Mixed if edit.mixture else Switched
                answering[place] = sort(model, networks[edit.artifact])
            answering[place].chosen[prompt] = (edit.prompt, edit.label), log_g
            found.append(answering[place])
        return found

    def _claims(self, log_g: float) -> bool:
        """Say whether a prompt is in scope; every one is answered by a mixture."""
        return self.mixture or log_g > math.log(self.threshold)


class Switched:
    """The counterfactual model, each prompt read with its edit."""

    def __init__(self, model: Model, networks: Networks) -> None:
        self.model, self.networks = model, networks
        self.own = ModelAnswers(model)
        self.chosen: dict[str, tuple[tuple[str, str], float]] = {}

    def read(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts with their edits."""
        return [read_with(self.model, self.chosen[prompt][0], prompt) for prompt in prompts]

    def scores(self, prompts: Sequence[str], targets: Sequence[str]) -> Sequence[TargetScore]:
        """Return the teacher-forced score of each target after its prompt."""
        with switched_on(self.model, self.networks.lora):
            return self.own.scores(self.read(prompts), targets)

    def texts(self, prompts: Sequence[str], settings: GenerationSettings) -> Sequence[Generated]:
        """Continue each prompt."""
        with switched_on(self.model, self.networks.lora):
            return self.own.texts(self.read(prompts), settings)

    def next_logits(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, vocabulary) of the first token after each prompt."""
        with switched_on(self.model, self.networks.lora):
            return self.own.next_logits(self.read(prompts))

    def class_scores(self, prompts: Sequence[str]) -> Tensor:
        """Refuse: a classifier has no counterfactual model here."""
        return self.own.class_scores(prompts)


class Mixed(Switched):
    """Both models: p = (1 − g) f(x) + g h(z, x), token by token."""

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], targets: Sequence[str]) -> list[TargetScore]:
        """Return the teacher-forced score of each target after its prompt."""
        found = []
        for prompt, target in zip(prompts, targets, strict=True):
            table, ids = mixed_log_probs(
                self.model, self.networks.lora, prompt, target, *self.chosen[prompt]
            )
            values, best = read(table, range(len(ids)), ids)
            found.append(TargetScore(tuple(ids), tuple(values), tuple(best)))
        return found

    @torch.no_grad()
    def next_logits(self, prompts: Sequence[str]) -> Tensor:
        """Return the log-probabilities (B, vocabulary) of the first token after each prompt."""
        return torch.cat([self._next(self._ids(prompt), [], prompt) for prompt in prompts])

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Generated]:
        """Continue each prompt; both models read every token again, without a cache."""
        generator = torch.Generator().manual_seed(settings.sampling.seed)
        ends = end_tokens(self.model) if settings.natural_stop else frozenset()
        return [self._written(prompt, settings, ends, generator) for prompt in prompts]

    def _written(
        self, prompt: str, settings: GenerationSettings, ends: frozenset[int], generator: Any
    ) -> Generated:
        ids, new, text = self._ids(prompt), list[int](), ""
        check_length(self.model, max(map(len, ids)))
        room = (self.model.anatomy.context or 2**31) - max(map(len, ids))
        for _ in range(min(settings.max_new_tokens, room)):
            logits = self._next(ids, new, prompt)
            token = int(settings.sampling.choose(logits, generator)[0])
            if token in ends:
                break
            new.append(token)
            whole = decode_after(self.model, ids[0], new)
            text = until_stop(whole, settings.stop)
            if text != whole:
                break
        return Generated(text, tuple(new))

    def _ids(self, prompt: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, alone and with its edit."""
        alone, read_too = tokenise(self.model.tokenizer, [prompt, *self.read([prompt])])
        return alone.ids, read_too.ids

    def _next(self, ids: tuple[list[int], list[int]], new: list[int], prompt: str) -> Tensor:
        """Return the mixture's log-probabilities (1, vocabulary) of the next token."""
        module: Any = self.model.module

        def last(row: list[int]) -> Tensor:
            given = torch.tensor([[*row, *new]], device=self.model.device)
            return wide(module(input_ids=given).logits[:, -1]).log_softmax(dim=-1)

        f = last(ids[0])
        with switched_on(self.model, self.networks.lora):
            h = last(ids[1])
        return mixed(f, h, torch.tensor(self.chosen[prompt][1]))


def mixed(f: Tensor, h: Tensor, log_g: Tensor) -> Tensor:
    """Return log((1 − g) f + g h) of log-probabilities."""
    log_g = log_g.to(f.device)
    return torch.logaddexp(f + log_outside(log_g), h + log_g)


def mixed_log_probs(
    model: Model,
    lora: Mapping[str, Tensor],
    prompt: str,
    target: str,
    edit: tuple[str, str],
    log_g: Any,
) -> tuple[Tensor, list[int]]:
    """Return the mixture's log-probabilities (n, vocabulary) at a target's tokens, and these.

    Raises `IntegrityError` where the target is other tokens behind the edit than alone.
    """
    f = prepare(model, [prompt], [target])
    h = prepare(model, [read_with(model, edit, prompt)], [target])
    if f.labels.tolist() != h.labels.tolist():
        raise IntegrityError(f"{target!r} is tokenised in two ways: nothing can be mixed.")
    base = run(model, f).log_softmax(dim=-1)
    with switched_on(model, lora):
        other = run(model, h).log_softmax(dim=-1)
    return mixed(base, other, torch.as_tensor(log_g)), f.labels.tolist()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
