"""The protocol: a named way of measuring, in words and as a function."""

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
        name: by which it is asked for; every measurement's protocol starts with it.
        summary: in a line or two, what it measures and how.
        origin: the paper or code that defined it.
        measure: is given an `errata.evaluate.Reader` on a model in one state and reads the
            questions off it. A metric without prompts is left out, never reported as 0, and so
            is everything relative to the base where `reader.base` is None. None: the plugin
            measures in its `evaluate` hook.
        needs: what a request must have for it; said where nothing could be measured.
    """

    name: str
    summary: str
    origin: str
    measure: Callable[[Any], list[Measurement]] | None = None
    needs: str = ""
