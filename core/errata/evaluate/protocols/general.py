"""The `general` protocol: what the edits did to everything that they were not about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from errata.evaluate.measurement import Measurement, bootstrap
from errata.evaluate.protocol import Protocol
from errata.evaluate.text import canary_texts, pooled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.evaluate.reader import Reader


def measure(reader: Reader) -> list[Measurement]:
    """Return perplexity on held-out text, and its ratio to the base's."""
    texts = canary_texts() if reader.settings.texts is None else list(reader.settings.texts)
    if not texts:
        return []
    nlls = reader.nlls(texts)
    total = sum(count for _, count in nlls)
    how = f"general: exp of the mean negative log-probability per token, {total} tokens"
    found = [_perplexity("perplexity", nlls, how, [(0.0, 0)] * len(nlls), "perplexity")]
    if reader.base is not None:
        how = f"general: perplexity relative to the unedited model, {total} tokens"
        reference = reader.base.nlls(texts)
        found.append(_perplexity("perplexity_ratio", nlls, how, reference, "ratio"))
    return found


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


PROTOCOL = Protocol(
    "general",
    "perplexity on held-out text, and its ratio to the base's",
    "Gupta et al. 2024, Model Editing at Scale leads to Gradual and Catastrophic Forgetting",
    measure,
)
