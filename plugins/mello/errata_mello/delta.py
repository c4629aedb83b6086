"""MeLLo's edits: sentences in a memory, and the loop that answers every prompt from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.delta.base import Delta, require
from errata.errors import FingerprintError
from errata.kit.sentence_encoder import sentence_encoder
from errata.model.answers import Generated
from errata.model.chat import user_turn
from errata.model.generation import until_stop
from errata.model.model_answers import ModelAnswers
from errata_mello.examples import FINAL
from errata_mello.loop import AnswerLoop, Trace

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model import Model
    from errata.model.answers import Answers, TargetScore
    from errata.model.sampling import GenerationSettings

_REMEMBERED = 512
"""Traces that are kept while the same edits are active: a question is scored and generated."""


@dataclass(frozen=True)
class LoopSettings:
    """How a memory is read.

    Attributes:
        encoder, encoder_digest: the sentence encoder, and which weights it has.
        artifact: key of what the encoder needs besides.
        parameter: name of the model's embedding: its fingerprint says which model is meant.
        rounds, examples, max_new_tokens, fallback: as in `MelloConfig`.
    """

    encoder: str | None
    encoder_digest: str
    artifact: tuple[str, ...]
    parameter: str
    rounds: int
    examples: int
    max_new_tokens: int
    fallback: bool


_COUNTS = ("rounds", "examples", "max_new_tokens")


class AnswerLoopDelta(Delta):
    """One sentence of MeLLo's memory.

    Args:
        fact: the sentence: prompt and new answer.
        vector: (d,) its unit vector.
        settings: how the memory is read.
    """

    kind: ClassVar[str] = "answer_loop"

    def __init__(self, fact: str, vector: Tensor, settings: LoopSettings) -> None:
        require(bool(fact.strip()), "A sentence of MeLLo's memory is empty.")
        require(
            vector.ndim == 1 and vector.numel() > 0 and vector.dtype == torch.float32,
            f"A sentence's vector must be one row of fp32 numbers, not {tuple(vector.shape)}.",
        )
        self.fact, self.vector, self.settings = fact, vector, settings

    def tensors(self) -> dict[str, Tensor]:
        """Return the vector."""
        return {"vector": self.vector.contiguous()}

    def metadata(self) -> dict[str, Any]:
        """Return the sentence and the settings."""
        settings = {**asdict(self.settings), "artifact": list(self.settings.artifact)}
        return {"fact": self.fact, "settings": settings}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild it; raise `IntegrityError` for anything that does not fit."""
        fact, given = metadata.get("fact"), metadata.get("settings")
        names = {f.name for f in fields(LoopSettings)}
        require(
            set(tensors) == {"vector"}
            and isinstance(fact, str)
            and isinstance(given, dict)
            and set(given) == names
            and all(type(given[name]) is int and given[name] >= 0 for name in _COUNTS)
            and isinstance(given["fallback"], bool)
            and isinstance(given["artifact"], list)
            and all(isinstance(part, str) for part in given["artifact"])
            and all(isinstance(given[name], str) for name in ("encoder_digest", "parameter"))
            and isinstance(given["encoder"], (str, type(None))),
            "A sentence of MeLLo's memory must hold a fact, its vector and the settings.",
        )
        assert isinstance(given, dict)
        assert isinstance(fact, str)
        settings = LoopSettings(**{**given, "artifact": tuple(given["artifact"])})
        return cls(fact, tensors["vector"], settings)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The embedding, which nothing changes: it says for which model the edit was made."""
        return (self.settings.parameter,)

    @property
    def artifacts(self) -> tuple[tuple[str, ...], ...]:
        """What the encoder needs besides, if anything."""
        return (self.settings.artifact,) if self.settings.artifact else ()

    @property
    def nbytes(self) -> int:
        """Bytes of the vector and the sentence."""
        return super().nbytes + len(self.fact.encode())

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def respond(
        cls, model: Model, deltas: Sequence[tuple[str, Self]], prompts: Sequence[str]
    ) -> list[Answers | None]:
        """Have the loop answer every prompt, as the newest edit's settings say."""
        memory = FactMemory(model, [delta for _, delta in deltas])
        return [memory if user_turn(model, prompt)[1].strip() else None for prompt in prompts]


class FactMemory:
    """What answers prompts: the loop over all sentences that are active."""

    def __init__(self, model: Model, facts: Sequence[AnswerLoopDelta]) -> None:
        self.model, self.facts = model, list(facts)
        self.own = ModelAnswers(model)
        settings = self.settings = facts[-1].settings
        # Sentences with vectors of another encoder cannot be found.
        self.facts = [f for f in facts if f.settings.encoder_digest == settings.encoder_digest]
        self.vectors = torch.stack([fact.vector for fact in self.facts])
        self.loop = AnswerLoop(
            model, self.look_up, settings.rounds, settings.examples, settings.max_new_tokens
        )

    def look_up(self, subquestion: str) -> str:
        """Return the sentence nearest to a sub-question."""
        encoder = sentence_encoder(self.model, self.settings.encoder)
        if encoder.digest != self.settings.encoder_digest:
            raise FingerprintError(
                f"The edits were made with the sentence encoder {self.settings.encoder!r} of other "
                "weights: get that encoder, or edit again."
            )
        (vector,) = encoder.encode([subquestion or "?"])
        return self.facts[int((self.vectors @ vector).argmax())].fact

    def traces(self, prompts: Sequence[str]) -> list[Trace]:
        """Return the trace of each prompt, written now or remembered."""
        of_edits: dict[tuple[str, ...], dict[str, Trace]] = self.model.remembered(
            "mello traces", dict
        )
        active = tuple(self.model.stack.ids)
        known = of_edits.get(active, {})
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        known = {**known, **dict(zip(new, self.loop.run(new), strict=True))}
        of_edits.clear()
        of_edits[active] = dict(list(known.items())[-_REMEMBERED:])
        return [known[prompt] for prompt in prompts]

    def texts(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Generated]:
        """Return each final answer with the trace that led to it; "" where there is none."""
        found = []
        for prompt, trace in zip(prompts, self.traces(prompts), strict=True):
            text = f" {trace.answer}" if trace.answer else ""
            if not text and self.settings.fallback:
                (own,) = self.own.texts([prompt], settings)
                found.append(Generated(own.text, own.ids, trace.details))
                continue
            found.append(Generated(until_stop(text, settings.stop), details=trace.details))
        return found

    def scores(self, prompts: Sequence[str], targets: Sequence[str]) -> Sequence[TargetScore]:
        """Return the score of each target as the loop's final answer."""
        return self.own.scores(self._asked(prompts), targets)

    def next_logits(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, vocabulary) of the final answer's first token."""
        return self.own.next_logits(self._asked(prompts))

    def class_scores(self, prompts: Sequence[str]) -> Tensor:
        """Refuse: a classifier writes nothing."""
        return self.own.class_scores(prompts)

    def _asked(self, prompts: Sequence[str]) -> list[str]:
        """Return what is read where the final answer begins; the prompt itself on a failure."""
        head = self.loop.head()
        asked = []
        for prompt, trace in zip(prompts, self.traces(prompts), strict=True):
            said = trace.text.rpartition(FINAL.strip())[0] or trace.text
            failed = trace.ending != "final" and self.settings.fallback
            end = replace(trace, text=f"{said.rstrip()}\n{FINAL.strip()}")
            asked.append(prompt if failed else self.loop.reading(end, head))
        return asked
