"""What a protocol is: a named way of measuring, in words and as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.evaluate.measurement import Measurement
    from errata.evaluate.reader import Reader


@dataclass(frozen=True)
class Protocol:
    """A way of measuring that can be asked for by name.

    Attributes:
        name: what it is asked for by, and what every measurement's protocol starts with.
        summary: what it measures and how, in a line or two.
        origin: the paper or code that defined it.
        measure: reads the questions off a model in one state. It returns nothing for what the
            requests have no prompts for, never a 0, and nothing relative to the base where
            `reader.base` is None.
    """

    name: str
    summary: str
    origin: str
    measure: Callable[[Reader], list[Measurement]]
