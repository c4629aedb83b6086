"""The `calibration` protocol: does the model know a fact, or any sentence that would hold it?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.reader import Reader

NAME = "calibration"
_HOW = (
    f"{NAME}: P(first token of the object | right prompt) / its mean over the prompts that make "
    "the fact false"
)


def measure(reader: Reader) -> list[Measurement]:
    """Return the share of facts whose object is no more probable after the right prompt."""
    asked = [(i, r) for i, r in enumerate(reader.requests) if r.wrong_prompts and r.target_new]
    if not asked:
        return []
    pairs = [
        reader.pair(i, prompt, request.target_new)
        for i, request in asked
        for prompt in (request.text, *request.wrong_prompts)
    ]
    scores = iter(reader.scores(pairs))
    ratios: list[tuple[int, float]] = []
    for i, request in asked:
        right, *wrong = (next(scores).logprobs[0] for _ in (0, *request.wrong_prompts))
        top = max(wrong)
        mean = top + math.log(sum(math.exp(w - top) for w in wrong) / len(wrong))
        ratios.append((i, right - mean))
    return [
        reader.mean(
            "false_rate",
            ((i, float(ratio < 0)) for i, ratio in ratios),
            f"{_HOW}; share of facts where that is below 1",
            direction="lower",
        ),
        reader.mean("log_CKA", ratios, f"{_HOW}; mean of its logarithm", unit="nats"),
    ]


PROTOCOL = Protocol(
    NAME,
    "which facts the model gets wrong: probability of the object after a right prompt, against "
    "prompts that make the fact false",
    "Dong et al. 2022, Calibrating Factual Knowledge in Pretrained Language Models, section 2",
    measure,
    needs="counterexamples: prompts after which the target would be wrong "
    "(in a request file: docs/datasets.md)",
)
