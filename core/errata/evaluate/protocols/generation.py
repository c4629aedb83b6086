"""The `generation` protocol: what a user of the model sees, with teacher forcing beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import questions

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.reader import Reader


def measure(reader: Reader) -> list[Measurement]:
    """Return the share of right answers to rewrite prompts, paraphrases and neighbours."""
    rewrite = questions.of_requests(reader.requests)
    paraphrases = questions.of_paraphrases(reader.requests)
    neighbourhood = questions.of_neighbourhood(reader.requests)
    return [
        *reader.ask("generation", "rewrite", rewrite),
        *reader.ask("generation", "paraphrase", paraphrases),
        *reader.ask("generation", "neighbourhood", neighbourhood),
        *reader.unchanged("generation", "neighbourhood_unchanged", neighbourhood),
        *reader.endings("generation", [*rewrite, *paraphrases, *neighbourhood]),
    ]


PROTOCOL = Protocol(
    "generation",
    "greedy answers with a natural stop, exact and contained, to the rewrite prompt, its "
    "paraphrases and its neighbourhood; share of neighbours with the base's text; teacher-forced "
    "beside",
    "Yang et al. 2025, The Mirage of Model Editing (WILD)",
    measure,
)
