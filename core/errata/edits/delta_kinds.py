"""Delta kinds by name: entry points in the group "errata.deltas", each loaded when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from errata.common.installed import loading, providers, the_one
from errata.errors import PluginError

if TYPE_CHECKING:
    from errata.edits.delta.base import Delta

GROUP = "errata.deltas"


class DeltaKinds(Mapping[str, "type[Delta]"]):
    """Every installed delta kind; editor, ledger, import and command line share this mapping.

    Looking a kind up raises `PluginError` where its package is broken, or where two packages
    claim its name.
    """

    def __init__(self) -> None:
        self._points = providers(GROUP)
        self._loaded: dict[str, type[Delta]] = {}

    def __getitem__(self, kind: str) -> type[Delta]:
        if kind not in self._loaded:
            self._loaded[kind] = _load(the_one(self._points[kind], "delta kind"))
        return self._loaded[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._points

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)


def _load(point: EntryPoint) -> type[Delta]:
    kind, where = point.name, f"The delta kind {point.name!r} ({point.value})"
    with loading(point, where):
        found = point.load()
    # Imported here: naming the kinds, as the ledger does, must not load torch.
    from errata.edits.delta.base import Delta

    if not (isinstance(found, type) and issubclass(found, Delta) and found.kind == kind):
        raise PluginError(f"{where} must be a subclass of errata's Delta with kind = {kind!r}.")
    if not found.effects:
        raise PluginError(
            f"{where} implements none of fold, attach, rewrite and respond: it would do nothing."
        )
    return found
