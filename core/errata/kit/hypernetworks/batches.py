"""The requests of a training in batches: what each asks of the matrices, and is asked afterwards.

The signals and the lesson of a batch are made when they are first asked for. What there is room
for is kept; the rest is made again each time, to the same numbers: nothing depends on the room, or
on what was made before. So a training on any number of requests runs in bounded memory, and one
that goes on after a kill sees what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch

from errata.kit.hypernetworks.lessons import PHRASINGS, Lesson
from errata.kit.hypernetworks.passages import cut_passages, plain_passages
from errata.kit.hypernetworks.predictions import Predictions
from errata.kit.hypernetworks.signals import Signals, joined_signals
from errata.kit.second_moments import documents_of

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.hypernetworks.settings import NetworkConfig
    from errata.model.model import Model

    Made = TypeVar("Made", Signals, Lesson)

_ROOM = 4 * 2**30  # bytes of signals and lessons that are kept
_DRAWN = 4  # prompts that must stay are prepared for each request, at least
_KEPT = torch.bfloat16  # of the signals that are trained on


@dataclass(frozen=True)
class RequestBatch:
    """Requests that are edited in one step, each by itself.

    Attributes:
        name: with the training's seed it decides everything random about the batch.
        requests: the requests.
    """

    name: str
    requests: tuple[Request, ...]

    @classmethod
    def split(cls, name: str, requests: Sequence[Request], size: int) -> list[RequestBatch]:
        """Return requests in batches of at most `size`, named by their place."""
        return [
            cls(f"{name} {place}", tuple(requests[at : at + size]))
            for place, at in enumerate(range(0, len(requests), size))
        ]


class BatchCache:
    """Signals and lessons of batches, kept while there is room.

    Args:
        model: the model, with every edit off.
        modules: paths of the edited modules.
        pool: the training requests, which the prompts that must stay may be drawn from.
        first: the batch whose lesson shows, for all, whether runs may begin at the lowest edited
            block.
        config: the hyper-parameters.
    """

    def __init__(
        self,
        model: Model,
        modules: Sequence[str],
        pool: Sequence[Request],
        first: RequestBatch,
        config: NetworkConfig,
    ) -> None:
        self._model, self._modules, self._pool, self._config = model, modules, pool, config
        self._signals: dict[str, Signals] = {}
        self._lessons: dict[str, Lesson] = {}
        self._said = Predictions(model)
        self._room = _ROOM
        self._layer = model.anatomy.lowest_block(modules) or 0
        if not self._made(first, check=True).resumes:
            self._layer = 0

    def signals(self, batch: RequestBatch) -> Signals:
        """Return the gradients of a batch's requests at the model, fp32 (rounded to bf16)."""

        def make() -> Signals:
            return joined_signals(self._model, batch.requests, self._modules).to(_KEPT)

        return self._remembered(self._signals, batch.name, make).to(torch.float32)

    def lesson(self, batch: RequestBatch) -> Lesson:
        """Return what a batch's requests are asked when they are edited."""
        return self._remembered(self._lessons, batch.name, lambda: self._made(batch))

    def _remembered(self, known: dict[str, Made], name: str, make: Callable[[], Made]) -> Made:
        if name in known:
            return known[name]
        made = make()
        if made.nbytes <= self._room:
            self._room -= made.nbytes
            known[name] = made
        return made

    @torch.no_grad()
    def _made(self, batch: RequestBatch, *, check: bool = False) -> Lesson:
        seed, model = self._config.seed, self._model
        generator, texts = seeded(seed, batch.name), seeded(seed, batch.name, "text")
        cut: list[list[tuple[str, str]]] = []
        beside: list[list[tuple[str, str]]] = []
        for request in batch.requests:
            whole = request.kind != "text" or request.paraphrases
            cut.append([] if whole else cut_passages(model, request, PHRASINGS, texts))
            beside.append(self._beside(request, generator, texts))
        return Lesson(model, batch.requests, beside, cut=cut, layer=self._layer, check=check)

    def _beside(
        self, request: Request, generator: torch.Generator, texts: torch.Generator
    ) -> list[tuple[str, str]]:
        """Return prompts with answers that an edit of a request must not move, a few at most."""
        n = max(self._config.n_locality, _DRAWN)
        if self._config.locality == "neighbours":
            probes = [*request.neighbourhood, *request.locality]
            pairs = [(p.prompt, request.joined(p.answers[0])) for p in probes if p.answers][:n]
            if pairs:
                return pairs
        order = torch.randperm(len(self._pool), generator=generator)[: n + 1].tolist()
        if request.kind == "text" and (plain := plain_passages(self._documents, n, texts)):
            return plain
        others = [self._pool[index] for index in order]
        others = [other for other in others if other.subject != request.subject][:n]
        return [(other.text, other.joined(self._answer(other))) for other in others]

    def _answer(self, other: Request) -> str:
        """Return what stays after another request's prompt: its true answer, or what is said."""
        own = self._config.locality_answers == "own" and self._config.locality == "others"
        true = (not own and other.target_true) or self._said[other.text]
        return true or other.target_new  # where nothing is said: its first token is asked, too

    @cached_property
    def _documents(self) -> list[str]:
        return documents_of(self._model)


def seeded(seed: int, *what: object) -> torch.Generator:
    """Return a generator seeded by a training's seed and by what it is for."""
    digest = hashlib.sha256(f"{seed} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
