"""What a protocol is: a named way of measuring, in words and as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement


@dataclass(frozen=True)
class Protocol:
    """A way of measuring that can be asked for by name.

    Attributes:
        name: what it is asked for by, and what every measurement's protocol starts with.
        summary: what it measures and how, in a line or two.
        origin: the paper or code that defined it.
        measure: is given an `errata.evaluate.Reader` on a model in one state and reads the
            questions off it. It returns nothing for what the requests have no prompts for, never
            a 0, and nothing relative to the base where `reader.base` is None.
    """

    name: str
    summary: str
    origin: str
    measure: Callable[[Any], list[Measurement]]
