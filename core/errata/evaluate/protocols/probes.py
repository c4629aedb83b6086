"""The `portability` and `locality` protocols: what should follow, and what must not change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import questions

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.reader import Reader


def portability(reader: Reader) -> list[Measurement]:
    """Return the share of right answers to what follows from the changes, in all and by type."""
    return reader.ask("portability", "portability", questions.of_portability(reader.requests))


def locality(reader: Reader) -> list[Measurement]:
    """Return the share of right and of unchanged answers to what must stay, by type."""
    asked = questions.of_locality(reader.requests)
    return [
        *reader.ask("locality", "locality", asked),
        *reader.unchanged("locality", "locality_unchanged", asked),
    ]


PORTABILITY = Protocol(
    "portability",
    "answers to what follows from the change (two hops, aliases, reversal), generated and "
    "teacher-forced",
    "Yao et al. 2023, Editing Large Language Models, section 5.1; scored by generation here",
    portability,
    needs="portability: questions whose answers follow from the change "
    "(in a request file: docs/datasets.md)",
)
LOCALITY = Protocol(
    "locality",
    "answers to what must not change, generated and teacher-forced; share of generations equal "
    "to the base's",
    "Yao et al. 2023, Editing Large Language Models, section 5.2; scored by generation here",
    locality,
    needs="locality: questions whose answers must stay (in a request file: docs/datasets.md)",
)
