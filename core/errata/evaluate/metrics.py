"""The core's own evaluator: it comes in through the same hook as everybody's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from errata.evaluate import counterfact, questions
from errata.evaluate.baseline import Baseline
from errata.evaluate.measurement import Measurement, bootstrap
from errata.evaluate.questions import Question, Reader
from errata.evaluate.text import canary_texts, pooled, text_nlls
from errata.hooks import hookimpl

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.model import Model
    from errata.request import Request

logger = logging.getLogger("errata")


@dataclass(frozen=True)
class Protocol:
    """A way of measuring that can be asked for by name."""

    name: str
    summary: str


PROTOCOLS: tuple[Protocol, ...] = (
    Protocol(
        "counterfact",
        "ES, PS, NS, their magnitudes, Score and GE as in the ROME paper: teacher-forced "
        "probability of the new against the true target",
    ),
    Protocol(
        "generation",
        "greedy answers with a natural stop, exact and contained, to the rewrite prompt and its "
        "paraphrases; share of the neighbourhood that still answers right; teacher-forced beside",
    ),
    Protocol(
        "portability",
        "answers to what follows from the change (two hops, aliases, reversal), generated and "
        "teacher-forced",
    ),
    Protocol(
        "locality",
        "answers to what must not change, generated and teacher-forced; with a baseline, share "
        "of generations equal to the base's",
    ),
    Protocol(
        "general",
        "perplexity on held-out text; with a baseline, its ratio to the base's",
    ),
)


class CoreMetrics:
    """Measures the protocols in `PROTOCOLS`. What is compared with the base needs a `Baseline`.

    Args:
        baseline: the base's own results. Without one, nothing relative to the base is measured;
            nor is it while no edit is active, when the model would be compared with itself.
        texts: held-out texts for `general`; by default the canary texts (with a baseline, its).
        max_new_tokens: length limit of generated answers.
        batch_size: rows per forward.
        seed: for the texts that GE samples.
    """

    def __init__(
        self,
        baseline: Baseline | None = None,
        *,
        texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.baseline = baseline
        self._texts = texts
        self._max_new_tokens = max_new_tokens if baseline is None else baseline.max_new_tokens
        self._batch_size = batch_size
        self._seed = seed

    @hookimpl
    def evaluate(
        self, model: Model, requests: Sequence[Request], protocols: Sequence[str]
    ) -> list[Measurement]:
        """Measure the model as it stands, for each known protocol in the order asked for.

        Metrics without a prompt in the requests are left out, never reported as 0.
        """
        if self.baseline is not None:
            self.baseline.check(model)
        reader = Reader(model, requests, self._max_new_tokens, self._batch_size)
        known: dict[str, Callable[[Reader], list[Measurement]]] = {
            "counterfact": lambda reader: counterfact.measure(reader, self._seed),
            "generation": self._generation,
            "portability": self._portability,
            "locality": self._locality,
            "general": self._general,
        }
        wanted = [name for name in dict.fromkeys(protocols) if name in known]
        if not reader.generates and {"generation", "portability", "locality"} & set(wanted):
            logger.warning(
                "%s is an encoder: it generates no text, so only teacher-forced numbers are "
                "measured.",
                model.name,
            )
        return [measurement for name in wanted for measurement in known[name](reader)]

    # -- protocols -------------------------------------------------------------------------------

    def _generation(self, reader: Reader) -> list[Measurement]:
        neighbourhood = questions.of_neighbourhood(reader.requests)
        return [
            *reader.ask("generation", "rewrite", questions.of_requests(reader.requests)),
            *reader.ask("generation", "paraphrase", questions.of_paraphrases(reader.requests)),
            *reader.ask("generation", "neighbourhood", neighbourhood),
            *self._unchanged(reader, "generation", "neighbourhood", neighbourhood),
        ]

    def _portability(self, reader: Reader) -> list[Measurement]:
        return reader.ask("portability", "portability", questions.of_portability(reader.requests))

    def _locality(self, reader: Reader) -> list[Measurement]:
        asked = questions.of_locality(reader.requests)
        return [
            *reader.ask("locality", "locality", asked),
            *self._unchanged(reader, "locality", "locality", asked),
        ]

    def _unchanged(
        self, reader: Reader, protocol: str, stem: str, asked: Sequence[Question]
    ) -> list[Measurement]:
        """Return the share of generations that are word for word the base's."""
        base = self._usable_baseline(reader.model)
        if base is None or not reader.generates:
            return []
        known = [question for question in asked if question.prompt in base.generations]
        if not known:
            return []
        texts = reader.texts(question.prompt for question in known)
        hits = [
            text.strip() == base.generations[question.prompt].strip()
            for text, question in zip(texts, known, strict=True)
        ]
        how = (
            f"{protocol}: greedy, natural stop, at most {reader.max_new_tokens} new tokens; "
            "same text as the unedited model"
        )
        return reader.by_type(f"{stem}_unchanged", how, known, hits)

    def _general(self, reader: Reader) -> list[Measurement]:
        base = self._usable_baseline(reader.model)
        if self._texts is not None:
            texts = list(self._texts)
        elif self.baseline is not None and self.baseline.nlls:
            texts = list(self.baseline.nlls)
        else:
            texts = canary_texts()
        nlls = text_nlls(reader.model, texts)
        total = sum(count for _, count in nlls)
        how = f"general: exp of the mean negative log-probability per token, {total} tokens"
        found = [_perplexity("perplexity", nlls, how, [(0.0, 0)] * len(nlls), "perplexity")]
        if base is not None and all(text in base.nlls for text in texts):
            reference = [base.nlls[text] for text in texts]
            found.append(
                _perplexity(
                    "perplexity_ratio",
                    nlls,
                    f"general: perplexity relative to the unedited model, {total} tokens",
                    reference,
                    "ratio",
                )
            )
        return found

    def _usable_baseline(self, model: Model) -> Baseline | None:
        if self.baseline is not None and not model.stack.ids:
            logger.info("No edit is active: the model is not compared with itself.")
            return None
        return self.baseline


def _perplexity(
    metric: str,
    nlls: Sequence[tuple[float, int]],
    how: str,
    reference: Sequence[tuple[float, int]],
    unit: str,
) -> Measurement:
    """Return perplexity (relative to a reference's) with a bootstrap interval over texts."""
    # Columns: nats, tokens, nats of the reference. A ratio of perplexities is one exponential.
    table = np.array(
        [(own, count, other) for (own, count), (other, _) in zip(nlls, reference, strict=True)]
    )

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.exp((means[:, 0] - means[:, 2]) / means[:, 1])
        return values

    return Measurement(
        metric,
        pooled([(own - other, count) for own, count, other in table.tolist()]),
        len(nlls),
        how,
        bootstrap(table, statistic),
        tuple(pooled([(o - r, c)]) for o, c, r in table.tolist() if c),
        unit=unit,
        direction="lower",
    )
