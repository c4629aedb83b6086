"""The location: where a model keeps what a request would change, with the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from errata.common.display import Described, shortened
from errata.common.json_numbers import finite


@dataclass(frozen=True, repr=False)
class Location(Described):
    """One place in the model, and why.

    Attributes:
        layer: index of the block, from 0.
        module: path of the module in the model.
        token: the token of the prompt, as text.
        token_index: its index in the prompt, from 0, special tokens in front included.
        score: the score of this place.
        protocol: "name: how the scores were measured".
        scores: score of every place, [token][layer].
        evidence: what else the locator knows: plain JSON values.
    """

    layer: int
    module: str
    token: str
    token_index: int
    score: float
    protocol: str
    scores: tuple[tuple[float, ...], ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "layer", str(self.layer)
        yield "module", self.module
        yield "token", f"{self.token_index} {self.token!r}"
        yield "score", f"{self.score:.4g}"
        low, high = self.evidence.get("low"), self.evidence.get("high")
        if isinstance(low, float) and isinstance(high, float):
            yield "between", f"{low:.4g} corrupted and {high:.4g} clean"
        yield "how", shortened(self.protocol, 120)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data; scores that are not finite become None."""
        return {
            "schema": 1,
            "result": "location",
            "layer": self.layer,
            "module": self.module,
            "token": self.token,
            "token_index": self.token_index,
            "score": finite(self.score),
            "protocol": self.protocol,
            "scores": [[finite(score) for score in row] for row in self.scores],
            "evidence": dict(self.evidence),
        }

    def __str__(self) -> str:
        return (
            f"layer {self.layer} ({self.module}) at token {self.token_index} {self.token!r}: "
            f"{self.score:.4g} ({self.protocol})"
        )
