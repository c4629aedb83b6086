"""The protocol: a named way of measuring, in words and as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errata.contract.measurement import Measurement
from errata.errors import ErrataError, PluginError


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

    def ask(self, reader: Any) -> list[Measurement]:
        """Return what `measure` makes of a reader; other packages' is held to the contract.

        Raises:
            ImpureMethodError: it changed the model.
            PluginError: it failed, or returned something else than measurements.
        """
        from errata.contract.purity import pure  # needs torch

        measure = self.measure
        if measure is None:
            return []
        if measure.__module__.partition(".")[0] == "errata":
            return measure(reader)
        whose = f"The protocol {self.name!r} of {measure.__module__}"
        with pure(reader.model, f"protocol {self.name!r}", "measure"):
            try:
                found = measure(reader)
            except ErrataError:
                raise
            except Exception as error:
                raise PluginError(
                    f"{whose} failed: {type(error).__name__}: {error} (the traceback shows where)."
                ) from error
        if not isinstance(found, (list, tuple)) or not all(
            isinstance(one, Measurement) for one in found
        ):
            raise PluginError(
                f"{whose} returned something else than a list of Measurement "
                "(errata.contract.measurement)."
            )
        return list(found)
