"""The `general` protocol: what the edits did to unrelated text and tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from errata.contract.measurement import Measurement, bootstrap
from errata.contract.protocol import Protocol
from errata.errors import ConfigError
from errata.evaluate.divergence import text_kls
from errata.evaluate.harness import harness_measurements
from errata.model.perplexity import joint_perplexity
from errata.model.texts import canary_texts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.evaluate.reader import Reader


def measure(reader: Reader) -> list[Measurement]:
    """Return perplexity on held-out text, its ratio to the base's, and the KL from the base.

    The KL divergence is that of the edited model's next-token distribution from the base's, KL(base
    ‖ edited), averaged over all tokens of the texts. What is relative to the base is left out for
    an unedited model. A sequence classifier has no perplexity, and one distribution per text, over
    its classes. Tasks of the lm-evaluation-harness follow where the settings name some.
    """
    texts = list(canary_texts()) if reader.settings.texts is None else list(reader.settings.texts)
    found = _of_texts(reader, texts) if texts else []
    return found + harness_measurements(reader, reader.settings.harness_tasks, "general")


def _of_texts(reader: Reader, texts: Sequence[str]) -> list[Measurement]:
    if reader.model.task == "classify":
        return [] if reader.base is None else [_divergence(reader, texts)]
    nlls = reader.nlls(texts)
    total = sum(count for _, count in nlls)
    how = f"general: exp of the mean negative log-probability per token, {total} tokens"
    found = [_perplexity("perplexity", nlls, how, [(0.0, 0)] * len(nlls), "perplexity")]
    if reader.base is None:
        return found
    how = f"general: perplexity relative to the unedited model, {total} tokens"
    reference = reader.base.nlls(texts)
    found.append(_perplexity("perplexity_ratio", nlls, how, reference, "ratio"))
    found.append(_divergence(reader, texts))
    return found


def _perplexity(
    metric: str,
    nlls: Sequence[tuple[float, int]],
    how: str,
    reference: Sequence[tuple[float, int]],
    unit: str,
) -> Measurement:
    """Return perplexity (relative to a reference's) with a bootstrap interval over texts.

    A text in which no token is predicted (an empty one, say) is none of them.
    """
    both = enumerate(zip(nlls, reference, strict=True))
    counted = {i: (own, count, other) for i, ((own, count), (other, _)) in both if count}
    # Columns: nats, tokens, nats of the reference. A ratio of perplexities is one exponential.
    table = np.array(list(counted.values()))
    relative = [(own - other, count) for own, count, other in counted.values()]

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.exp((means[:, 0] - means[:, 2]) / means[:, 1])
        return values

    return Measurement(
        metric,
        joint_perplexity(relative),
        len(counted),
        how,
        bootstrap(table, statistic),
        tuple(joint_perplexity([one]) for one in relative),
        tuple(f"text-{i}" for i in counted),
        unit=unit,
        direction="lower",
    )


def _divergence(reader: Reader, texts: Sequence[str]) -> Measurement:
    """Return the mean KL per distribution with a bootstrap interval over texts."""
    read = {f"text-{i}": text for i, text in enumerate(texts) if text.strip()}
    if not read:
        raise ConfigError("None of the texts has a token: there is nothing to compare.")
    kls = text_kls(reader, list(read.values()))
    total = sum(count for _, count in kls)

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = means[:, 0] / means[:, 1]
        return values

    return Measurement(
        "kl_to_base",
        math.fsum(nats for nats, _ in kls) / total,
        len(kls),
        f"general: mean over {total} {_over(reader)} of KL(unedited || edited)",
        bootstrap(np.array(kls, dtype=np.float64), statistic),
        tuple(nats / count for nats, count in kls),
        tuple(read),
        unit="nats",
        direction="lower",
    )


def _over(reader: Reader) -> str:
    if reader.model.task == "classify":
        return "distributions over the classes, one a text,"
    return "next-token distributions, whole vocabulary,"


PROTOCOL = Protocol(
    "general",
    "held-out perplexity and its ratio to the base's, KL from the base on the same text, and "
    "lm-evaluation-harness tasks where the settings name some",
    "Gupta et al. 2024, Model Editing at Scale leads to Gradual and Catastrophic Forgetting",
    measure,
)
