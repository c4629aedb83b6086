"""IKE's demonstrations: what they are drawn from, and which ones an edit gets.

Zheng et al. 2023, section 3: three types teach three things.

    copy    New Fact: p t*  Prompt: p              t*      (say the new answer)
    update  New Fact: p t*  Prompt: a paraphrase   t*      (also when asked in other words)
    retain  New Fact: p t*  Prompt: a neighbour    t       (and leave other facts alone)

Against the authors' code: it keeps 13 sentences a record and does not say how their ranking
becomes a ranking of records; here a record is as near as the nearest of three (its copy, its first
paraphrase, its first neighbour). Types are dealt out by a generator that the configuration's seed
and the request seed, not by one for the whole test set: an edit is the same whichever came before.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.errors import ConfigError
from errata.kit.sentence_encoder import sentence_encoder
from errata.model.tokens import tokenise
from errata_in_context.delta import ANSWER_ROOM, FACT, PROMPT, demonstration

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model

COPY, UPDATE, RETAIN = "copy", "update", "retain"
RATIO = ((COPY, 1), (UPDATE, 3), (RETAIN, 4))
_QUERY_ROOM = 64
"""Tokens that are left for the prompt itself, which is not known when the edit is made."""


class DemoRecord(NamedTuple):
    """The parts of one training request that demonstrations are made of.

    Attributes:
        fact: its prompt with the new answer.
        prompt, answer: these two apart.
        paraphrases: the same question in other words.
        neighbours: other facts' prompts, each with its answer.
    """

    fact: str
    prompt: str
    answer: str
    paraphrases: list[str]
    neighbours: list[list[str]]

    def shown(self, kind: str, chance: random.Random) -> str:
        """Return a demonstration of one type; `chance` picks the paraphrase or neighbour."""
        if kind == UPDATE:
            return demonstration(self.fact, chance.choice(self.paraphrases), self.answer)
        if kind == RETAIN:
            return demonstration(self.fact, *chance.choice(self.neighbours))
        return demonstration(self.fact, self.prompt, self.answer)

    def sentences(self) -> list[str]:
        """Return one demonstration of each type: the first of its paraphrases and neighbours."""
        return [
            demonstration(self.fact, self.prompt, self.answer),
            demonstration(self.fact, self.paraphrases[0], self.answer),
            demonstration(self.fact, *self.neighbours[0]),
        ]


class Demonstrations:
    """The training records with the vectors (records, 3, d) of their sentences.

    Args:
        records: what demonstrations are made of.
        vectors: of `DemoRecord.sentences`, unit length.
        model, encoder: the encoder that made the vectors, for `model`.
    """

    def __init__(
        self, records: Sequence[DemoRecord], vectors: Tensor, model: Model, encoder: str | None
    ) -> None:
        self.records, self.vectors = list(records), vectors
        self._model, self._encoder = model, encoder

    @classmethod
    def of(
        cls, model: Model, training: Sequence[Request], encoder: str | None, most: int
    ) -> Demonstrations:
        """Return those of the training requests, computed once.

        `training` may be empty where they were computed before.

        Raises `ConfigError` where no request has paraphrases, and neighbours with answers.
        """

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            records = _records(training, most)
            texts = [text for record in records for text in record.sentences()]
            opened = sentence_encoder(model, encoder)
            track = model.progress.track
            rows = [opened.encode([t])[0] for t in track(texts, "Encoding demonstrations")]
            # As a tensor: what is JSON lies in the header of the file, which is bounded.
            raw = torch.tensor(list(json.dumps(records).encode()), dtype=torch.uint8)
            vectors = torch.stack(rows).reshape(len(records), 3, -1)
            return {"vectors": vectors, "records": raw}, {"records": len(records)}

        digest = sentence_encoder(model, encoder).digest[:16]
        tensors, _ = model.of_base(
            "demonstrations", digest or "own", str(most), compute=compute, trained=True
        )
        records = [DemoRecord(*r) for r in json.loads(bytes(tensors["records"].tolist()))]
        return cls(records, tensors["vectors"], model, encoder)

    def published(self, request: Request, count: int, seed: int) -> tuple[str, ...]:
        """Return the authors' demonstrations for a request, nearest last, its own copy behind.

        Of `count` demonstrations as many are used as fit into the model's context; the types keep
        their ratio of 1 : 3 : 4.
        """
        own = demonstration(fact_of(request), request.text, request.target_new)
        chance = random.Random(f"{seed} {request.digest}")
        order = self._similar(request).amax(dim=1).argsort(descending=True, stable=True).tolist()
        nearest = [self.records[i] for i in order[:count]]
        kinds = dealt(len(nearest))
        chance.shuffle(kinds)
        shown = [record.shown(k, chance) for record, k in zip(nearest, kinds, strict=True)]
        room = self._room(own + fact_of(request))
        while shown and self._length(shown) > room:
            # The farthest go; each type keeps its share of those that stay.
            kept = dealt(len(shown) - 1)
            chance.shuffle(kept)
            shown = [r.shown(k, chance) for r, k in zip(nearest, kept, strict=False)]
        return (*reversed(shown), own)

    def nearest_sentences(self, request: Request, count: int) -> tuple[str, ...]:
        """Return EasyEdit's demonstrations: the nearest sentences of any type, nearest first."""
        order = self._similar(request).reshape(-1).argsort(descending=True, stable=True).tolist()
        sentences = [self.records[i // 3].sentences()[i % 3] for i in order[:count]]
        room = self._room(fact_of(request))
        while sentences and self._length(sentences) > room:
            sentences.pop()
        return tuple(sentences)

    def _similar(self, request: Request) -> Tensor:
        """Return the cosine (records, 3) of every sentence with the request's own."""
        query = f"{FACT}{fact_of(request)}\n{PROMPT}{request.text}"
        (vector,) = sentence_encoder(self._model, self._encoder).encode([query])
        cosines: Tensor = self.vectors @ vector
        return cosines

    def _room(self, beside: str) -> int:
        limit = self._model.anatomy.context
        if limit is None:
            return 2**31
        return limit - ANSWER_ROOM - _QUERY_ROOM - self._length([beside])

    def _length(self, texts: Sequence[str]) -> int:
        return sum(len(row.ids) for row in tokenise(self._model.tokenizer, list(texts)))


def dealt(count: int) -> list[str]:
    """Return that many types in the ratio copy : update : retain = 1 : 3 : 4, as near as it gets.

    >>> [dealt(32).count(kind) for kind in ("copy", "update", "retain")]
    [4, 12, 16]
    """
    whole = sum(share for _, share in RATIO)
    exact = [(kind, count * share / whole) for kind, share in RATIO]
    kinds = [kind for kind, number in exact for _ in range(int(number))]
    by_rest = sorted(exact, key=lambda pair: int(pair[1]) - pair[1])
    return kinds + [kind for kind, _ in by_rest[: count - len(kinds)]]


def fact_of(request: Request) -> str:
    """Return the fact as a sentence: the prompt with its new answer."""
    return f"{request.text} {request.target_new}"


def without_lead_in(paraphrase: str, subject: str) -> str:
    """Return a paraphrase without the unrelated sentences that CounterFact puts before it.

    The authors cut everything up to the last full stop or line break before the subject.
    """
    at = paraphrase.find(subject)
    if at < 0:
        return paraphrase
    breaks = list(re.finditer(r"[.\n]\s*", paraphrase[:at]))
    cut = paraphrase[breaks[-1].end() :] if breaks else paraphrase
    return cut.removeprefix("Category").lstrip(" :") or paraphrase


def _records(training: Sequence[Request], most: int) -> list[DemoRecord]:
    records: list[DemoRecord] = []
    for request in training:
        if len(records) == most:
            break
        asked = [without_lead_in(text, request.subject) for text in request.paraphrases]
        kept = [
            [probe.prompt, probe.answers[0]] for probe in request.neighbourhood if probe.answers
        ]
        if asked and kept and request.target_new:
            records.append(
                DemoRecord(fact_of(request), request.text, request.target_new, asked, kept)
            )
    if not records:
        raise ConfigError(
            "Demonstrations are made of training requests with paraphrases and neighbours that "
            f"have answers (CounterFact's, say); none of the {len(training)} given ones has both."
        )
    return records
