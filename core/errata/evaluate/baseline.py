"""The base model's own results, taken once with every edit off, for comparisons with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from errata.errors import FingerprintError
from errata.evaluate.generation import generate
from errata.evaluate.text import canary_texts, text_nlls

if TYPE_CHECKING:
    from errata.model import Model
    from errata.request import Request


@dataclass(frozen=True)
class Baseline:
    """What the base answers, so that an edited model is never compared with itself.

    Attributes:
        fingerprint: of the base model.
        max_new_tokens: length limit of the generations.
        generations: prompt → greedy generation (natural stop) of the base.
        nlls: text → (summed negative log-probability in nats, tokens) of the base.
    """

    fingerprint: str
    max_new_tokens: int
    generations: Mapping[str, str] = field(default_factory=dict)
    nlls: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        model: Model,
        requests: Sequence[Request],
        *,
        texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> Baseline:
        """Measure the base: every edit is off while this runs and on again afterwards.

        Args:
            model: the model, edited or not.
            requests: whose neighbourhood and locality prompts are answered.
            texts: for perplexity; by default the canary texts, () for none.
            max_new_tokens: length limit; the evaluator that compares must use the same.
            batch_size: rows per forward.
        """
        prompts = list(
            dict.fromkeys(p.prompt for r in requests for p in (*r.neighbourhood, *r.locality))
        )
        texts = canary_texts() if texts is None else list(texts)
        with model.base_state():
            answers = (
                generate(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
                if prompts and model.anatomy.kind != "encoder"
                else []
            )
            nlls = text_nlls(model, texts) if texts else []
        return cls(
            model.fingerprint,
            max_new_tokens,
            dict(zip(prompts, answers, strict=False)),
            dict(zip(texts, nlls, strict=True)),
        )

    def check(self, model: Model) -> None:
        """Raise `FingerprintError` unless this is the baseline of the model's own base."""
        if self.fingerprint != model.fingerprint:
            raise FingerprintError(
                f"The baseline is of base model {self.fingerprint[:12]}, but {model.name} has "
                f"the base {model.fingerprint[:12]}. Capture one: Baseline.capture(model, …)."
            )
