"""Protocols by name, errata's own and strangers', and what each measures on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.contract import plugins
from errata.contract.manager import Manager
from errata.contract.measurement import Measurement
from errata.contract.purity import pure
from errata.errors import PluginError, blaming

if TYPE_CHECKING:
    from errata.contract.protocol import Protocol
    from errata.evaluate.reader import Reader


def installed_protocols() -> dict[str, Protocol]:
    """Return every protocol by name: errata's own, and those of installed packages."""
    return Manager("", plugins.in_group()).protocols()


def measured(protocol: Protocol, reader: Reader) -> list[Measurement]:
    """Return what a protocol's `measure` makes of a reader; a stranger's is held to the contract.

    Raises:
        ImpureMethodError: it changed the model.
        PluginError: it failed, or returned something else than measurements.
    """
    measure = protocol.measure
    if measure is None:
        return []
    if measure.__module__.partition(".")[0] == "errata":
        return measure(reader)
    whose = f"The protocol {protocol.name!r} of {measure.__module__}"
    with pure(reader.model, f"protocol {protocol.name!r}", "measure"):
        with blaming(f"{whose} failed"):
            found = measure(reader)
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(item, Measurement) for item in found
    ):
        raise PluginError(
            f"{whose} returned something else than a list of Measurement "
            "(errata.contract.measurement)."
        )
    return list(found)
