"""A reader whose answers are given, so that a protocol's numbers can be computed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from errata.contract.measurement import Measurement
from errata.contract.protocol import Protocol
from errata.edits.request import Request
from errata.evaluate.reader import KnownAnswers, MeasureSettings, Reader
from errata.model import Model
from errata.model.answers import TargetScore

Pair = tuple[str, str]


class Words:
    """A tokenizer of words: one id for each, in the order in which they are first seen."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(w, len(self.ids)) for w in text.split()]}


def score(*probabilities: float, right: Sequence[bool] | None = None) -> TargetScore:
    """Return a score with these probabilities per token; a token is right from one half on."""
    hits = [p >= 0.5 for p in probabilities] if right is None else right
    ids = tuple(range(len(probabilities)))
    predicted = tuple(i if hit else -1 for i, hit in zip(ids, hits, strict=True))
    return TargetScore(ids, tuple(map(math.log, probabilities)), predicted)


def ask(
    protocol: Protocol,
    requests: Sequence[Request],
    *,
    texts: Mapping[str, str] | None = None,
    scores: Mapping[Pair, TargetScore] | None = None,
    samples: Mapping[tuple[str, ...], list[str]] | None = None,
    base: KnownAnswers | None = None,
    kind: str = "decoder",
    **settings: Any,
) -> dict[str, Measurement]:
    """Measure a model that answers as given; anything not given cannot be asked.

    With `base` the model is an edited one, compared with a base that answers so; without, it is
    the base itself.
    """
    anatomy = SimpleNamespace(kind=kind, context=None)
    model = SimpleNamespace(
        anatomy=anatomy, module=None, config=SimpleNamespace(), tokenizer=Words(), name="stub",
        stack=SimpleNamespace(ids=[] if base is None else ["1"]), generates=kind != "encoder",
        task={"decoder": "causal", "encoder": "masked"}.get(kind, "seq2seq"),
    )  # fmt: skip
    memory = KnownAnswers(
        dict(texts or {}), dict(scores or {}), {},
        {(0, prompts): found for prompts, found in (samples or {}).items()},
    )  # fmt: skip
    reader = Reader(
        cast("Model", model), list(requests), MeasureSettings(**settings), base, memory=memory
    )
    found = protocol.measure(reader)
    names = [measurement.metric for measurement in found]
    assert len(set(names)) == len(names), "two measurements of one name"
    assert {measurement.name for measurement in found} <= {protocol.name}
    return {measurement.metric: measurement for measurement in found}


def values(found: Mapping[str, Measurement]) -> dict[str, float]:
    """Return metric → value."""
    return {name: measurement.value for name, measurement in found.items()}
