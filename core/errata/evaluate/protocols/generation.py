"""The `generation` protocol: what a user of the model sees, with teacher forcing beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import reader as questions

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.reader import Reader


def measure(reader: Reader) -> list[Measurement]:
    """Return the share of right answers to rewrite prompts, paraphrases and neighbours."""
    neighbourhood = questions.of_neighbourhood(reader.requests)
    return [
        *reader.ask("generation", "rewrite", questions.of_requests(reader.requests)),
        *reader.ask("generation", "paraphrase", questions.of_paraphrases(reader.requests)),
        *reader.ask("generation", "neighbourhood", neighbourhood),
        *reader.unchanged("generation", "neighbourhood_unchanged", neighbourhood),
    ]


PROTOCOL = Protocol(
    "generation",
    "greedy answers with a natural stop, exact and contained, to the rewrite prompt, its "
    "paraphrases and its neighbourhood; share of neighbours with the base's text; teacher-forced "
    "beside",
    "Yang et al. 2025, The Mirage of Model Editing (WILD)",
    measure,
)
