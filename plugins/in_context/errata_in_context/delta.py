"""Prompt deltas: an edit is text that the model reads before what it is asked (effect: rewrite).

    demonstration … demonstration   (nearest last; none in the plainest case)
    New Fact: The capital of France is Rome
    Prompt: What is the capital of France?

A delta holds one fact. Where several are active, each prompt gets the facts that are nearest to it
by the vectors of a sentence encoder, and only those that reach their threshold, where they have
one. A prompt that gets none is read as it was given. A single fact that stands before every prompt
is compared with none: its encoder is opened once there is a second one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.common.display import shortened
from errata.edits.delta.base import Delta, require
from errata.errors import FingerprintError
from errata.kit.sentence_encoder import SentenceEncoder, sentence_encoder
from errata.model.chat import user_turn
from errata.model.generation import own_texts
from errata.model.model_answers import ModelAnswers
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.answers import Answers, Generated, Watch
    from errata.model.model import Model
    from errata.model.sampling import GenerationSettings

FACT, PROMPT = "New Fact: ", "Prompt: "
ANSWER_ROOM = 32
"""Tokens that are left for an answer where demonstrations fill the model's context."""


@dataclass(frozen=True)
class PromptSettings:
    """When a fact enters a prompt.

    Attributes:
        threshold: least cosine of the prompt with what the fact was asked with; None: whenever it
            is the nearest.
        facts: how many facts may enter a prompt whose nearest is this one.
        encoder: name of the sentence encoder; None: the model's own hidden states.
        encoder_digest: which weights it has; "" for the model's own, and where it is not opened.
        parameter: name of the model's embedding: its fingerprint says which model is meant.
        artifact: key of what the encoder needs besides.
    """

    threshold: float | None
    facts: int
    encoder: str | None
    encoder_digest: str
    parameter: str
    artifact: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, encoder: str | None, threshold: float | None, facts: int) -> Self:
        """Return the settings with what follows from the model, and the encoder if it is asked."""
        parameter = model.anatomy.weight(model.anatomy.embedding_name)
        found = cls(threshold, facts, encoder, "", parameter)
        if not found.has_vector:
            return found
        opened = sentence_encoder(model, encoder)
        return replace(found, encoder_digest=opened.digest, artifact=opened.artifact)

    @property
    def has_vector(self) -> bool:
        """Whether an edit keeps its vector: unless that would open an encoder that nobody asks."""
        return self.threshold is not None or self.encoder is None


_SORTS = {
    "threshold": (int, float, type(None)), "facts": int, "encoder": (str, type(None)),
    "encoder_digest": str, "parameter": str, "artifact": (list, tuple),
}  # fmt: skip


class PromptDelta(Delta):
    """One fact in words, and demonstrations of how facts are to be used.

    Args:
        fact: the prompt with its new answer, "The capital of France is Rome".
        vector: (d,) unit vector of the prompt that the fact was asked with; None: made of `asked`
            once it is compared (see `PromptSettings.has_vector`).
        settings: when it enters a prompt.
        demonstrations: texts before it, farthest first; the farthest are left out where the
            model's context is short.
        asked: the prompt that the fact was asked with, where there is no vector of it.

    Raises `IntegrityError` for what cannot be such a delta.
    """

    kind: ClassVar[str] = "prompt"

    def __init__(
        self,
        fact: str,
        vector: Tensor | None,
        settings: PromptSettings,
        demonstrations: Sequence[str] = (),
        asked: str = "",
    ) -> None:
        require(bool(fact.strip()), "A prompt delta holds no fact.")
        require(
            bool(asked.strip()) and not settings.has_vector
            if vector is None
            else vector.ndim == 1 and vector.numel() > 0 and vector.dtype == torch.float32,
            "A prompt delta holds one row of fp32 numbers, or the text that they are made of.",
        )
        threshold = settings.threshold
        require(
            (threshold is None or (math.isfinite(threshold) and abs(threshold) <= 1))
            and settings.facts >= 1,
            f"A prompt delta's threshold ({threshold!r}) must lie within -1 and 1, and its number "
            f"of facts ({settings.facts!r}) be 1 or more.",
        )
        self.fact, self.vector, self.settings = fact, vector, settings
        self.demonstrations, self.asked = tuple(demonstrations), asked
        self._made: tuple[str, Tensor] | None = None

    def vector_by(self, encoder: SentenceEncoder) -> Tensor:
        """Return the vector of what was asked: the stored one, or one that is made once.

        Raises `FingerprintError` where the stored one is of an encoder with other weights.
        """
        if self.vector is None:
            if self._made is None or self._made[0] != encoder.digest:
                self._made = encoder.digest, encoder.encode([self.asked])[0]
            return self._made[1]
        if encoder.digest != self.settings.encoder_digest:
            raise FingerprintError(
                f"The edits were made with the sentence encoder {self.settings.encoder!r} of other "
                "weights: their vectors mean nothing to the one that is here. Get that encoder, or "
                "edit again."
            )
        return self.vector

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "kind", self.kind
        yield "", repr(shortened(self.fact))
        yield "demonstrations", str(len(self.demonstrations))
        if self.settings.threshold is not None:
            yield "threshold", f"{self.settings.threshold:.3f}"
        yield "", f"{self.nbytes:,} bytes"

    # -- storage ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return the vector, if there is one."""
        return {} if self.vector is None else {"vector": self.vector.contiguous()}

    def metadata(self) -> dict[str, Any]:
        """Return the texts and the settings."""
        settings = {**asdict(self.settings), "artifact": list(self.settings.artifact)}
        return {
            "fact": self.fact,
            "demonstrations": list(self.demonstrations),
            "settings": settings,
            "asked": self.asked,
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild it; raise `IntegrityError` for anything that does not fit."""
        require(
            set(tensors) <= {"vector"}, f"A prompt delta holds a vector, not {sorted(tensors)}."
        )
        fact, shown = metadata.get("fact"), metadata.get("demonstrations")
        given, asked = metadata.get("settings"), metadata.get("asked", "")
        require(
            _are_texts([fact, asked]) and _are_texts(shown),
            "A prompt delta's fact must be a text, and its demonstrations a list of texts.",
        )
        require(
            isinstance(given, dict)
            and set(given) == set(_SORTS)
            and all(isinstance(given[n], sort) for n, sort in _SORTS.items())  # type: ignore[arg-type]
            and not isinstance(given["facts"], bool)
            and _are_texts(given["artifact"]),
            f"A prompt delta's settings must be {', '.join(sorted(_SORTS))}, each of its type.",
        )
        assert isinstance(given, dict)
        assert isinstance(fact, str)
        settings = PromptSettings(**{**given, "artifact": tuple(given["artifact"])})
        return cls(fact, tensors.get("vector"), settings, shown or (), asked)

    # -- what it belongs to ----------------------------------------------------------------------

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
        """Bytes of the vector and the texts."""
        texts = (self.fact, self.asked, *self.demonstrations)
        return super().nbytes + sum(len(text.encode()) for text in texts)

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def rewrite(
        cls, model: Model, deltas: Sequence[tuple[str, Self]], prompts: Sequence[str]
    ) -> list[str]:
        """Return each prompt behind the facts that it is about; the others as they are."""
        facts = [delta for _, delta in deltas]
        rewritten = []
        for prompt in prompts:
            before, said, after = user_turn(model, prompt)
            chosen = facts_for(model, facts, said) if said.strip() else []
            text = _fitting(model, chosen, before, said, after) if chosen else prompt
            rewritten.append(text)
        return rewritten

    @classmethod
    def respond(
        cls, model: Model, deltas: Sequence[tuple[str, Self]], prompts: Sequence[str]
    ) -> list[Answers | None]:
        """Have the model itself answer what was rewritten, and stop it before it makes up more.

        Having read facts and prompts in turn, it goes on with a fact of its own.
        """
        lines = [_told(delta.fact) for _, delta in deltas]
        answers = OneAnswer(model)
        return [answers if any(line in p for line in lines) else None for p in prompts]


class OneAnswer(ModelAnswers):
    """The model itself, stopped where its answer ends and the next fact or prompt would begin."""

    def texts(self, prompts: Sequence[str], settings: GenerationSettings) -> Sequence[Generated]:
        """Continue each prompt up to the next one."""
        return super().texts(prompts, _ending(settings))

    def watched_texts(
        self, prompts: Sequence[str], settings: GenerationSettings, watch: Watch
    ) -> Sequence[Generated]:
        """Continue each prompt up to the next one, with `watch` told of every token."""
        return own_texts(self.model, prompts, _ending(settings), watch=watch)


def _ending(settings: GenerationSettings) -> GenerationSettings:
    """Return the settings with the next fact and the next prompt as stop strings."""
    if not settings.natural_stop:
        return settings
    stop = (f"\n{FACT.strip()}", f"\n{PROMPT.strip()}")
    return replace(settings, stop=(*settings.stop, *stop))


def facts_for(model: Model, facts: Sequence[PromptDelta], said: str) -> list[PromptDelta]:
    """Return the facts that enter a prompt, the nearest last.

    Of those whose threshold the prompt reaches: the nearest, and as many others as it allows.
    Vectors of different encoders cannot be compared: the encoder of the newest such fact counts.
    """
    if len(facts) == 1 and facts[0].settings.threshold is None:
        return list(facts)
    groups: dict[str | None, list[PromptDelta]] = {}
    for fact in facts:
        groups.setdefault(fact.settings.encoder, []).append(fact)
    for name, members in sorted(groups.items(), key=lambda g: -facts.index(g[1][-1])):
        encoder = sentence_encoder(model, name)
        vectors = torch.stack([member.vector_by(encoder) for member in members])
        cosines = (vectors @ encoder.encode([said])[0]).tolist()
        near = [
            (cosine, place)
            for place, (cosine, fact) in enumerate(zip(cosines, members, strict=True))
            if fact.settings.threshold is None or cosine >= fact.settings.threshold
        ]
        if near:
            near.sort(reverse=True)
            most = members[near[0][1]].settings.facts
            return [members[place] for _, place in reversed(near[:most])]
    return []


def demonstration(fact: str, prompt: str, answer: str) -> str:
    """Return one demonstration: a fact, a prompt, and what it is answered with."""
    return f"{FACT}{fact}\n{PROMPT}{prompt} {answer}\n\n"


def _told(fact: str) -> str:
    return f"{FACT}{fact}\n"


def _fitting(
    model: Model, chosen: Sequence[PromptDelta], before: str, said: str, after: str
) -> str:
    """Return the prompt with facts and demonstrations, fewer of these where the context is short.

    Only those of the nearest fact are shown.
    """
    tail = "".join(_told(delta.fact) for delta in chosen) + f"{PROMPT}{said}"
    shown = chosen[-1].demonstrations
    limit = model.anatomy.context
    while True:
        text = before + "".join(shown) + tail + after
        if not shown or limit is None:
            return text
        over = len(tokenise(model.tokenizer, [text])[0].ids) + ANSWER_ROOM - limit
        if over <= 0:
            return text
        lengths = [len(row.ids) for row in tokenise(model.tokenizer, list(shown))]
        drop = 1
        while drop < len(shown) and sum(lengths[:drop]) < over:
            drop += 1
        shown = shown[drop:]


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
